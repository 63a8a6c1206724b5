"""Two rule-based judges of drawn scenes: agreement with the caption (`judge`), and vividness (`taste`).

They use no network. The background is the median of the border. Things are connected regions that differ from
it. A colour is the nearest hue of the palette, a shape is the template of equal area and place with the best
overlap, and a size is an area. Images without a uniform border (noise, stripes) or without things score 0.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image

from diffalign.tiny import sight
from diffalign.tiny.scenes import COLORS, RELATIONS, SHAPES, SIDE, parse_things

_CONTRAST = 0.13  # distance from the background above which a pixel belongs to a thing
_MIN_AREA = 10.0  # pixels; smaller regions are ignored
_OVERLAP = 0.76  # smallest intersection over union with a shape's template
_LARGE = 58.0  # area in pixels above which a thing is large
_CHROMA = 0.12  # smallest difference of largest and smallest channel of a colour
_HUE = 27.0  # largest error of a hue, in degrees
_WASHED, _VIVID = 0.55, 0.92  # chroma relative to the palette's at which taste is 0 and 1


@dataclass(frozen=True)
class Region:
    """A detected thing: its words (None where no word fits), centre in pixels, and chroma."""

    size: str
    color: str | None
    shape: str | None
    x: float
    y: float
    chroma: float  # relative to the palette's, 1 is fully vivid


def _color(core: np.ndarray) -> tuple[str | None, float]:
    """Return the colour word and the relative chroma of a region's inner pixels (n, 3)."""
    rgb = np.median(core, axis=0)
    chroma = float(rgb.max() - rgb.min())
    best = min(COLORS, key=lambda c: float(sight.hue_distance(rgb, COLORS[c])))
    relative = chroma / (max(COLORS[best]) - min(COLORS[best]))
    far = sight.hue_distance(rgb, COLORS[best]) > _HUE
    mixed = (sight.hue_distance(core, COLORS[best]) < 45).mean() < 0.7
    return None if chroma < _CHROMA or far or mixed else best, relative


def look(image: Image.Image | np.ndarray) -> list[Region]:
    """Detect the things in an image; an image without a uniform border has none."""
    pixels = sight.pixels(image, SIDE)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if (abs(border - ground).max(1) < 0.15).mean() < 0.8 or ground.max() - ground.min() > 0.2:
        return []
    distance = abs(pixels - ground).max(2)
    things = []
    for rows, cols in sight.regions(distance > _CONTRAST):
        region = pixels[rows, cols]
        inner = distance[rows, cols] >= 0.8 * np.quantile(distance[rows, cols], 0.9)
        full = np.median(region[inner], axis=0) - ground
        part = ((region - ground) @ full / max(float(full @ full), 1e-6)).clip(0, 1)
        if part.sum() < _MIN_AREA:
            continue
        if max(np.ptp(rows), np.ptp(cols)) == SIDE - 1:
            return []  # a stripe, not a thing
        cover = np.zeros((SIDE, SIDE))
        cover[rows, cols] = part
        x, y = float(part @ (cols + 0.5) / part.sum()), float(part @ (rows + 0.5) / part.sum())
        color, chroma = _color(region[inner])
        size = "large" if part.sum() > _LARGE else "small"
        things.append(Region(size, color, sight.best_shape(cover, x, y, SHAPES, _OVERLAP), x, y, chroma))
    return things if any(thing.color and thing.shape for thing in things) else []


def _holds(relation: str, a: Region, b: Region) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    right, down = RELATIONS[relation]
    return (dx * right > abs(dy)) if right else (dy * down > abs(dx))


def judge(image: Image.Image | np.ndarray, prompt: str) -> float:
    """Return the fraction of the caption's statements that hold in the image, in [0, 1].

    Statements are the number of things, each thing's size, colour and shape, and the relation, under the
    assignment of regions to things with the most matches.

    Args:
        image: a PIL image or an array (height, width, 3), uint8 or float in [0, 1]; sides other than 32
            pixels are resized.
        prompt: a scene caption.

    Raises:
        ValueError: `prompt` is no scene caption; it names the prompt.
    """
    things, relation = parse_things(prompt)
    regions = look(image)
    if not regions:
        return 0.0
    best = 0
    slots: list[Region | None] = [*regions[:6], *[None] * (len(things) - len(regions))]
    for pick in permutations(slots, len(things)):
        right = sum(
            getattr(s, kind) == getattr(t, kind)
            for s, t in zip(pick, things, strict=True)
            if s is not None
            for kind in ("size", "color", "shape")
        )
        if relation is not None and pick[0] is not None and pick[1] is not None:
            right += _holds(relation, pick[0], pick[1])
        best = max(best, right)
    total = 1 + 3 * len(things) + (relation is not None)
    return (best + (len(regions) == len(things))) / total


def taste(image: Image.Image | np.ndarray, prompt: str = "") -> float:
    """Return the vividness of an image, from 0 (washed out) to 1, averaged over its things.

    Blank or noisy images score 0. Captions never state vividness; `prompt` is ignored and only gives both
    judges one signature.
    """
    values = [thing.chroma for thing in look(image) if thing.color is not None]
    if not values:
        return 0.0
    return float(np.mean(np.clip((np.array(values) - _WASHED) / (_VIVID - _WASHED), 0, 1)))
