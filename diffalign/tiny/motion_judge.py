"""Rule-based judges of moving shapes: content of the frames, motion as captioned, and speed.

They use no network. Things are detected in every frame as by `diffalign.tiny.judge`. A thing of the caption
is tracked as the region that fits its words best and is nearest to its last place. `content` measures number,
colours and shapes in all frames; `motion` measures direction, speed and evenness; `dynamics` measures speed
regardless of the caption.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from diffalign.tiny.judge import Region, look
from diffalign.tiny.motions import DIRECTIONS, FPS, SPEEDS, Mover, axis, parse

_SLACK = 1.2  # tolerance of a speed, in pixels a second
_DIVIDE = 5.6  # threshold between slow and quick, in pixels a second
_STRIDE = 3  # frames of a step: slow things move a quarter of a pixel a frame
_STILL, _LEAP = 0.4, 1.8  # shares of the mean step: a shorter step is a halt, a longer one a leap
_TREMBLE = 0.2  # measurement error of a step, in pixels


@dataclass(frozen=True)
class Track:
    """The track of one thing.

    Attributes:
        place: (F, 2), x and y in pixels in each frame; NaN where the thing is not detected.
        right: (F,), number of its words (colour, shape) that hold in each frame.
    """

    place: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Tracks:
    """The tracks of all things of a clip.

    Attributes:
        tracks: one track for each thing of the caption.
        count: (F,), number of detected things in each frame.
        fps: frames a second.
    """

    tracks: tuple[Track, ...]
    count: np.ndarray
    fps: float


def _fit(region: Region | None, mover: Mover, last: tuple[float, float] | None) -> float:
    """Return how well a region fits a thing, by its words and its distance from the thing's last place."""
    if region is None:
        return -1.0
    words = 2.0 * (region.color == mover.color) + (region.shape == mover.shape)
    distance = 0.0 if last is None else float(np.hypot(region.x - last[0], region.y - last[1]))
    return words + 3.0 * max(0.0, 1 - distance / 8)


def watch(frames: np.ndarray, movers: tuple[Mover, ...], fps: float = FPS) -> Tracks:
    """Track the things through frames (F, height, width, 3), uint8 or float in [0, 1]."""
    n, count = len(movers), np.zeros(len(frames), dtype=int)
    place = np.full((n, len(frames), 2), np.nan)
    right = np.zeros((n, len(frames)))
    last: list[tuple[float, float] | None] = [None] * n
    for f, frame in enumerate(frames):
        regions = look(frame)
        count[f] = len(regions)
        slots: list[Region | None] = [*regions[:5], *[None] * n]
        best = max(
            permutations(slots[: max(n, min(len(regions), 5))], n),
            key=lambda pick: sum(_fit(s, m, w) for s, m, w in zip(pick, movers, last, strict=True)),
        )
        for i, (region, mover) in enumerate(zip(best, movers, strict=True)):
            if region is not None:
                last[i] = (region.x, region.y)
                place[i, f] = last[i]
                right[i, f] = (region.color == mover.color) + (region.shape == mover.shape)
    return Tracks(tuple(Track(p, r) for p, r in zip(place, right, strict=True)), count, fps)


def frame_scores(clip: Tracks) -> np.ndarray:
    """Return for each frame, (F,), the share of statements (count, colours, shapes) that hold."""
    n = len(clip.tracks)
    return (sum(t.right for t in clip.tracks) + (clip.count == n)) / (2 * n + 1)


def content(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Return the agreement of number, colours and shapes, in [0, 1]: the average of mean and worst frame.

    Raises:
        ValueError: `prompt` is no caption of moving shapes; it names the prompt.
    """
    scores = frame_scores(watch(frames, parse(prompt), fps))
    return float((scores.mean() + scores.min()) / 2)


def velocity(track: Track, fps: float) -> np.ndarray:
    """Return the velocity (right, down) in pixels a second, by a linear fit to all detected places.

    It is 0 if the thing is detected in fewer than three frames.
    """
    detected = ~np.isnan(track.place[:, 0])
    if detected.sum() < 3:
        return np.zeros(2)
    seconds = np.arange(len(detected))[detected] / fps
    return np.array([np.polyfit(seconds, track.place[detected, k], 1)[0] for k in (0, 1)])


def evenness(track: Track, direction: tuple[int, int]) -> np.ndarray:
    """Return for each step of three frames, (F - 3,), whether it is even: no halt, no leap, not backwards.

    It is False where the thing is not detected.
    """
    along = track.place @ np.array(direction, dtype=float)
    steps = along[_STRIDE:] - along[:-_STRIDE]
    detected = ~np.isnan(along)
    if detected.sum() < 2 or (mean := _mean_step(along, detected)) <= 0:
        return np.zeros(len(steps), dtype=bool)
    return (steps > _STILL * mean) & (steps < _LEAP * mean + _TREMBLE)  # comparisons with NaN are False


def _mean_step(along: np.ndarray, detected: np.ndarray) -> float:
    """Return the mean length of a step, from the first and the last detected place."""
    first, last = np.flatnonzero(detected)[[0, -1]]
    return _STRIDE * float(along[last] - along[first]) / float(last - first)


def _pace(speed: float, word: str) -> float:
    """Return 1 for a speed in the word's range, decreasing linearly to 0 at 3 pixels a second outside."""
    low, high = SPEEDS[word]
    low, high = (low - _SLACK, _DIVIDE) if word == "slowly" else (_DIVIDE if word else low - _SLACK, high + 2)
    off = max(low - speed, speed - high, 0.0)
    return max(0.0, 1 - off / 3)


def motion(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Return the mean over things of direction, speed and evenness, in [0, 1].

    A thing that is not detected or moves in another direction scores 0.

    Raises:
        ValueError: `prompt` is no caption of moving shapes; it names the prompt.
    """
    movers = parse(prompt)
    clip = watch(frames, movers, fps)
    total = 0.0
    for track, mover in zip(clip.tracks, movers, strict=True):
        v = velocity(track, fps)
        direction = DIRECTIONS[mover.direction]
        along = float(v @ np.array(direction))
        if along > 0.5 and along > abs(v[1 - axis(mover)]):
            total += (1 + _pace(along, mover.speed) + float(evenness(track, direction).mean())) / 3
    return total / len(movers)


def dynamics(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Return the mean speed of the caption's things in pixels a second, in any direction: dynamic degree."""
    clip = watch(frames, parse(prompt), fps)
    return float(np.mean([np.hypot(*velocity(t, fps)) for t in clip.tracks]))
