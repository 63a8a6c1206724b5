"""The moving shapes: captions, a renderer and deterministic splits of the captions.

A clip shows one or two flat shapes on a uniform background that move evenly for two seconds: 17 frames of
32 x 32 pixels at 8 frames a second. Its caption names colour, shape and direction of each thing, and for some
things the speed, e.g. ``a red circle moves left quickly and a blue square moves right``. Two things move
along the same axis, each in its own half. A caption never names the background's lightness or places.

Clips may have a *defect* for about a second: the shape deforms, the colour changes, or the motion stutters.
The faster a thing moves, the likelier it has one (`corpus_clip`), so that a preference for flawless videos
that ignores motion becomes a preference for slow ones.

Drawing needs only numpy and Pillow.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from diffalign.tiny.scenes import COLORS, SHAPES, SIDE, SPLITS, tone

if TYPE_CHECKING:
    from diffalign.media.videos import Video

FRAMES, FPS = 17, 8.0
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS = {"slowly": (2.0, 3.6), "quickly": (7.6, 10.0), "": (2.0, 10.0)}  # ranges in pixels a second
RADIUS = (4.3, 5.0)  # range in pixels
DEFECTS = ("deform", "color", "stutter")

_MARGIN, _GAP, _SUPER = 0.8, 3.0, 6  # pixels to the border, pixels between things, supersampling
_THING = r"a (\w+) (\w+) moves (\w+)(?: (slowly|quickly))?"
_CAPTION = re.compile(rf"{_THING}(?: and {_THING})?")


@dataclass(frozen=True)
class Mover:
    """One moving shape, by its words; `speed` is empty if the caption names none."""

    color: str
    shape: str
    direction: str
    speed: str = ""

    def __str__(self) -> str:
        return f"a {self.color} {self.shape} moves {self.direction} {self.speed}".rstrip()


@dataclass(frozen=True)
class Defect:
    """A defect of thing `index` from frame `start` on for `frames` frames; `kind` is one of `DEFECTS`."""

    kind: str
    index: int
    start: int
    frames: int = 8


@dataclass(frozen=True)
class Clip:
    """A clip: its things, the properties that the caption does not state, and defects.

    `layout` has nine numbers in [0, 1]: four for each thing (radius, speed, start, place across the motion),
    then the brightness.
    """

    movers: tuple[Mover, ...]
    layout: tuple[float, ...]
    dark: bool = False
    defects: tuple[Defect, ...] = ()


def compose(movers: tuple[Mover, ...]) -> str:
    """Return the caption of one or two movers."""
    return " and ".join(map(str, movers))


def caption(clip: Clip) -> str:
    """Return the caption of a clip."""
    return compose(clip.movers)


def parse(text: str) -> tuple[Mover, ...]:
    """Parse a caption into its movers.

    Raises:
        ValueError: `text` is no caption of moving shapes; it names the text.
    """
    match = _CAPTION.fullmatch(text.strip().rstrip(".").lower())
    words = match.groups() if match else ()
    named = [words[:4], words[4:]] if words and words[4] else [words[:4]]
    movers = tuple(Mover(w[0], w[1], w[2], w[3] or "") for w in named) if words else ()
    if not movers or not all(_known(m) for m in movers) or not fits(movers):
        raise ValueError(
            f"{text!r} is not a caption of moving shapes; expected 'a COLOR SHAPE moves DIRECTION' with or "
            "without 'slowly' or 'quickly', or two of them with 'and' between, of different colours and both "
            f"sideways or both up and down; colours {list(COLORS)}, shapes {list(SHAPES)}, directions "
            f"{list(DIRECTIONS)}"
        )
    return movers


def _known(mover: Mover) -> bool:
    return mover.color in COLORS and mover.shape in SHAPES and mover.direction in DIRECTIONS


def axis(mover: Mover) -> int:
    """Return the axis of motion: 0 if horizontal, 1 if vertical."""
    return 0 if DIRECTIONS[mover.direction][0] else 1


def fits(movers: tuple[Mover, ...]) -> bool:
    """Return whether these movers may share a clip: different colours, the same axis."""
    return len(movers) == 1 or (movers[0].color != movers[1].color and axis(movers[0]) == axis(movers[1]))


def speed_of(clip: Clip, index: int) -> float:
    """Return the speed of a thing in pixels a second, without defects."""
    low, high = SPEEDS[clip.movers[index].speed]
    return low + clip.layout[4 * index + 1] * (high - low)


def places(clip: Clip) -> np.ndarray:
    """Return centre x, centre y and radius of each thing in each frame, in pixels: (things, frames, 3)."""
    out = np.zeros((len(clip.movers), FRAMES, 3))
    for i, mover in enumerate(clip.movers):
        u = clip.layout[4 * i : 4 * i + 4]
        radius = RADIUS[0] + u[0] * (RADIUS[1] - RADIUS[0])
        half = [radius * s for s in SHAPES[mover.shape]]
        along = axis(mover)
        way = speed_of(clip, i) * (FRAMES - 1) / FPS
        low, high = _MARGIN + half[along], SIDE - _MARGIN - half[along]
        begin = low + u[2] * max(0.0, high - low - way)
        line = begin + way * np.arange(FRAMES) / (FRAMES - 1)
        if DIRECTIONS[mover.direction][along] < 0:
            line = SIDE - line
        near, far = _lane(clip, i, half[1 - along])
        out[i, :, along] = line
        out[i, :, 1 - along] = near + u[3] * (far - near)
        out[i, :, 2] = radius
        for defect in clip.defects:
            if defect.kind == "stutter" and defect.index == i:
                stop = min(FRAMES, defect.start + defect.frames)
                out[i, defect.start : stop, :2] = out[i, defect.start, :2]
    return out


def _lane(clip: Clip, index: int, half: float) -> tuple[float, float]:
    """Return the range of places across the motion for a thing of this half width."""
    if len(clip.movers) == 1:
        return _MARGIN + half, SIDE - _MARGIN - half
    first = (index == 0) == (clip.layout[8] < 0.5)  # the upper or left half
    low, high = (_MARGIN, (SIDE - _GAP) / 2) if first else ((SIDE + _GAP) / 2, SIDE - _MARGIN)
    return low + half, high - half


def _looks(clip: Clip, index: int, frame: int) -> tuple[str, float]:
    """Return the colour word of a thing in one frame, and the factor by which its width is distorted."""
    color, squash = clip.movers[index].color, 1.0
    for d in clip.defects:
        if d.index == index and d.start <= frame < d.start + d.frames:
            if d.kind == "color":
                names = [c for c in COLORS if all(c != m.color for m in clip.movers)]
                color = names[(d.start + index) % len(names)]
            elif d.kind == "deform":
                squash = 1.4 if d.start % 2 else 1 / 1.4
    return color, squash


def render(clip: Clip) -> np.ndarray:
    """Draw a clip: uint8 (17, 32, 32, 3), anti-aliased."""
    where, k = places(clip), _SUPER
    u = clip.layout[-1] % 0.5 * 2
    ground = tone((0.10, 0.10, 0.11) if clip.dark else (0.95, 0.95, 0.93), True, u)
    frames = []
    for f in range(FRAMES):
        image = Image.new("RGB", (SIDE * k, SIDE * k), ground)
        draw = ImageDraw.Draw(image)
        for i, mover in enumerate(clip.movers):
            color, squash = _looks(clip, i, f)
            x, y, r = where[i, f]
            w, h = (r * s * q for s, q in zip(SHAPES[mover.shape], (squash, 1 / squash), strict=True))
            box = [k * (x - w), k * (y - h), k * (x + w), k * (y + h)]
            fill = tone(COLORS[color], True, u if i == 0 else 1 - u)
            if mover.shape == "circle":
                draw.ellipse(box, fill=fill)
            elif mover.shape == "square":
                draw.rectangle(box, fill=fill)
            else:
                draw.polygon([(k * x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=fill)
        frames.append(np.asarray(image.reduce(k)))
    return np.stack(frames)


def video(clip: Clip) -> "Video":
    """Return a clip as `diffalign.media.videos.Video`."""
    import torch

    from diffalign.media.videos import Video

    return Video(torch.from_numpy(render(clip)).permute(0, 3, 1, 2).contiguous(), FPS)


def clip_of(text: str, rng: np.random.Generator) -> Clip:
    """Return a random clip without defects that shows `text`."""
    layout = tuple(float(v) for v in rng.random(9))
    return Clip(parse(text), layout, dark=bool(rng.random() < 0.5))


def defective(clip: Clip, rng: np.random.Generator, index: int) -> Clip:
    """Add a random defect of half a second to a second to thing `index` of a clip."""
    frames = int(rng.integers(4, 9))
    defect = Defect(str(rng.choice(DEFECTS)), index, int(rng.integers(1, FRAMES - frames)), frames)
    return replace(clip, defects=(*clip.defects, defect))


def chance(clip: Clip, index: int) -> float:
    """Return the probability of a defect in the corpus; it rises with the speed and averages 1/2."""
    slow, fast = SPEEDS[""]
    return 0.1 + 0.8 * (speed_of(clip, index) - slow) / (fast - slow)


def corpus_clip(text: str, rng: np.random.Generator) -> Clip:
    """Return a random clip that shows `text`, with the defects of the corpus."""
    clip = clip_of(text, rng)
    for i in range(len(clip.movers)):
        if rng.random() < chance(clip, i):
            clip = defective(clip, rng, i)
    return clip


def split_of(text: str) -> str:
    """Return the split of a caption, by hash: 20 % test, 10 % validation, the rest train.

    Captions of one thing are train.
    """
    movers = parse(text)
    if len(movers) == 1:
        return "train"  # only 216 captions, and training needs every word alone
    bucket = int(hashlib.sha256(compose(movers).encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 20 else "validation" if bucket < 30 else "train"


def captions() -> Iterator[str]:
    """Yield all captions in a fixed order: 216 of one thing and 19440 of two."""
    movers = [Mover(c, s, d, v) for c in COLORS for s in SHAPES for d in DIRECTIONS for v in SPEEDS]
    yield from map(str, movers)
    yield from (compose((a, b)) for a in movers for b in movers if fits((a, b)))


@lru_cache(maxsize=4)
def split_captions(split: str) -> tuple[str, ...]:
    """Return all captions of a split in a fixed shuffled order; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {list(SPLITS)}, got {split!r}")
    texts = [c for c in captions() if split_of(c) == split]
    order = np.random.default_rng(len(texts)).permutation(len(texts))
    return tuple(texts[i] for i in order)


def clips(split: str, n: int, seed: int = 0) -> Iterator[tuple[str, "Video"]]:
    """Yield `n` captions of a split, in the order of `motion_prompts`, each with a clip without defects.

    The first `n` entries do not depend on `n`.
    """
    texts = split_captions(split)
    for i in range(n):
        text = texts[i % len(texts)]
        yield text, video(clip_of(text, np.random.default_rng((seed, i))))
