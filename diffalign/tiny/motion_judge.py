"""Judges of moving shapes that read pixels: is the right thing there all the time, and does it move as told?

No network: every frame is read as `diffalign.tiny.judge` reads a picture; a thing of the caption is followed
from frame to frame as the region that fits its words best and is nearest to where it was. `content` asks for
number, colours and shapes in every frame; `motion` for direction, speed and evenness; `dynamics` only how
fast things move, whatever the caption says.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from diffalign.tiny.judge import Seen, look
from diffalign.tiny.motions import DIRECTIONS, FPS, SPEEDS, Mover, axis, parse

_SLACK = 1.2  # pixels a second that a speed may be off
_DIVIDE = 5.6  # pixels a second between slow and quick
_STRIDE = 3  # frames of a step: slow things move a quarter of a pixel a frame
_STILL, _LEAP = 0.4, 1.8  # of the mean step: shorter is a halt, longer a leap
_TREMBLE = 0.2  # pixels that a step may be misread by


@dataclass(frozen=True)
class Track:
    """What becomes of one thing: in each frame its place (F, 2), NaN where it is not seen, and how many of
    its two words (colour, shape) hold (F,).
    """

    place: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class Look:
    """A clip as the judges see it: a track of each thing, and how many things each frame shows (F,)."""

    tracks: tuple[Track, ...]
    count: np.ndarray
    fps: float


def _fit(seen: Seen | None, mover: Mover, last: tuple[float, float] | None) -> float:
    """How well a region fits a thing: its words, then how near it is to the last place (below 1)."""
    if seen is None:
        return -1.0
    words = 2.0 * (seen.color == mover.color) + (seen.shape == mover.shape)
    far = 0.0 if last is None else float(np.hypot(seen.x - last[0], seen.y - last[1]))
    return words + 3.0 * max(0.0, 1 - far / 8)


def watch(frames: np.ndarray, movers: tuple[Mover, ...], fps: float = FPS) -> Look:
    """Follow the things through frames (F, height, width, 3), uint8 or float in [0, 1]."""
    n, count = len(movers), np.zeros(len(frames), dtype=int)
    place = np.full((n, len(frames), 2), np.nan)
    right = np.zeros((n, len(frames)))
    last: list[tuple[float, float] | None] = [None] * n
    for f, frame in enumerate(frames):
        seen = look(frame)
        count[f] = len(seen)
        slots: list[Seen | None] = [*seen[:5], *[None] * n]
        best = max(
            permutations(slots[: max(n, min(len(seen), 5))], n),
            key=lambda pick: sum(_fit(s, m, w) for s, m, w in zip(pick, movers, last, strict=True)),
        )
        for i, (found, mover) in enumerate(zip(best, movers, strict=True)):
            if found is not None:
                last[i] = (found.x, found.y)
                place[i, f] = last[i]
                right[i, f] = (found.color == mover.color) + (found.shape == mover.shape)
    return Look(tuple(Track(p, r) for p, r in zip(place, right, strict=True)), count, fps)


def frame_scores(seen: Look) -> np.ndarray:
    """Share of the statements (count; colour and shape of each thing) that hold in each frame, (F,)."""
    n = len(seen.tracks)
    return (sum(t.right for t in seen.tracks) + (seen.count == n)) / (2 * n + 1)


def content(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Return the agreement of number, colours and shapes, 0 to 1: half the mean of the frames, half the
    worst of them.

    ValueError naming the prompt if it is not a caption of moving shapes.
    """
    scores = frame_scores(watch(frames, parse(prompt), fps))
    return float((scores.mean() + scores.min()) / 2)


def velocity(track: Track, fps: float) -> np.ndarray:
    """Pixels a second to the right and down: the straight line through all places; zeros if seen less than
    thrice.
    """
    there = ~np.isnan(track.place[:, 0])
    if there.sum() < 3:
        return np.zeros(2)
    at = np.arange(len(there))[there] / fps
    return np.array([np.polyfit(at, track.place[there, k], 1)[0] for k in (0, 1)])


def evenness(track: Track, direction: tuple[int, int]) -> np.ndarray:
    """For each step of three frames (F - 3,) whether it is neither a halt nor a leap nor back; False where
    the thing is not seen.
    """
    along = track.place @ np.array(direction, dtype=float)
    steps = along[_STRIDE:] - along[:-_STRIDE]
    there = ~np.isnan(along)
    if there.sum() < 2 or (mean := _mean_step(along, there)) <= 0:
        return np.zeros(len(steps), dtype=bool)
    return (steps > _STILL * mean) & (steps < _LEAP * mean + _TREMBLE)  # NaN is neither


def _mean_step(along: np.ndarray, there: np.ndarray) -> float:
    """Return the stride's mean length by the first and the last place that are seen."""
    first, last = np.flatnonzero(there)[[0, -1]]
    return _STRIDE * float(along[last] - along[first]) / float(last - first)


def _pace(speed: float, word: str) -> float:
    """1 for a speed that the word allows, less the further off, 0 from 3 pixels a second on."""
    low, high = SPEEDS[word]
    low, high = (low - _SLACK, _DIVIDE) if word == "slowly" else (_DIVIDE if word else low - _SLACK, high + 2)
    off = max(low - speed, speed - high, 0.0)
    return max(0.0, 1 - off / 3)


def motion(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Direction, speed and evenness of each thing, 0 to 1; a thing that is not seen or goes elsewhere has 0.

    ValueError naming the prompt if it is not a caption of moving shapes.
    """
    movers = parse(prompt)
    seen = watch(frames, movers, fps)
    total = 0.0
    for track, mover in zip(seen.tracks, movers, strict=True):
        v = velocity(track, fps)
        way = DIRECTIONS[mover.direction]
        along = float(v @ np.array(way))
        if along > 0.5 and along > abs(v[1 - axis(mover)]):
            total += (1 + _pace(along, mover.speed) + float(evenness(track, way).mean())) / 3
    return total / len(movers)


def dynamics(frames: np.ndarray, prompt: str, fps: float = FPS) -> float:
    """Pixels a second, the mean over the caption's things, whichever way they go: the dynamic degree."""
    seen = watch(frames, parse(prompt), fps)
    return float(np.mean([np.hypot(*velocity(t, fps)) for t in seen.tracks]))
