"""Two rule-based judges of patterned scenes: agreement with the caption (`judge`), and light (`taste`).

They use no network. The background is linear in the height, fitted to the border. A shape is a connected
region that differs from it, with its holes filled. Its fill is the painted share of its inner part, its
colour the nearest hue of the palette, its shape the template with the best overlap. Images without a uniform
border (noise, stripes) or without shapes score 0.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from PIL import Image
from scipy import ndimage

from diffalign.tiny import sight
from diffalign.tiny.patterns import COLORS, GROUNDS, LIGHT, LINE, SHAPES, SIDE, parse
from diffalign.tiny.scenes import RELATIONS

_CONTRAST = 0.16  # distance from the background above which a pixel belongs to a shape
_MIN_AREA = 60  # pixels; smaller regions are ignored, and count as dirt above `_DIRT`
_DIRT = 12
_OVERLAP = 0.76  # smallest intersection over union with a shape's template
_CHROMA = 0.25  # smallest difference of largest and smallest channel of a colour
_HUE = 20.0  # largest error of a hue, in degrees
_HOLLOW, _SOLID = 0.24, 0.80  # painted shares of the inner part below and above which a fill is seen
_STRIPED = 0.18  # smallest standard deviation of the painted share over the columns of a striped shape
_UNEVEN = 0.10  # largest median error of the border


@dataclass(frozen=True)
class Region:
    """A detected shape: its words (None where no word fits) and its centre in pixels."""

    fill: str | None
    color: str | None
    shape: str | None
    x: float
    y: float


@dataclass(frozen=True)
class View:
    """What is seen in an image: shapes, the background's word, and its slope of brightness.

    `light` is the brightness at the top minus that at the bottom, by `patterns.LIGHT`.
    """

    regions: tuple[Region, ...]
    ground: str
    light: float


def _ground(pixels: np.ndarray) -> np.ndarray | None:
    """Return the fitted background (H, 1, 3); None if the border is not of one colour in each row."""
    sides = np.concatenate([pixels[:, :2], pixels[:, -2:]], axis=1)  # (H, 4, 3)
    rows = np.median(sides, axis=1)
    height = np.arange(SIDE) - (SIDE - 1) / 2
    middle = np.median(rows, axis=0)
    halves = np.median(rows[: SIDE // 2], axis=0) - np.median(rows[SIDE // 2 :], axis=0)
    ground = (middle - height[:, None] * halves / (SIDE / 2))[:, None]
    error = abs(pixels - ground).max(2)
    border = np.concatenate([error[0], error[-1], error[:, 0], error[:, -1]])
    uneven = np.median(border) > _UNEVEN or (border < 0.15).mean() < 0.8
    return None if uneven or np.ptp(middle) > 0.15 else ground


def _fill(part: np.ndarray, inside: np.ndarray) -> str | None:
    """Return the fill of a shape by its painted shares (H, H) and its filled mask."""
    depth = ndimage.distance_transform_edt(inside)
    inner = depth > LINE + 0.8
    if inner.sum() < 8:
        return None
    share = float(part[inner].mean())
    if share < _HOLLOW or share > _SOLID:
        return "hollow" if share < _HOLLOW else "solid"
    painted, heights = (part * inner).sum(0), inner.sum(0)
    columns = painted[heights > 0] / heights[heights > 0]
    return "striped" if np.std(columns) > _STRIPED else None


def _color(core: np.ndarray) -> str | None:
    """Return the colour word of a region's strongest pixels (n, 3)."""
    rgb = np.median(core, axis=0)
    best = min(COLORS, key=lambda c: float(sight.hue_distance(rgb, COLORS[c])))
    far = sight.hue_distance(rgb, COLORS[best]) > _HUE
    mixed = (sight.hue_distance(core, COLORS[best]) < 40).mean() < 0.7
    return None if np.ptp(rgb) < _CHROMA or far or mixed else best


def look(image: Image.Image | np.ndarray) -> View | None:
    """Detect the shapes in an image; None if it has no uniform border or no shape."""
    pixels = sight.pixels(image, SIDE)
    ground = _ground(pixels)
    if ground is None:
        return None
    difference = pixels - ground
    filled = ndimage.binary_fill_holes(abs(difference).max(2) > _CONTRAST)
    labels, _ = ndimage.label(filled)
    regions = []
    for i, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
        high, wide = rows.stop - rows.start, cols.stop - cols.start
        if max(high, wide) >= SIDE - 1:
            return None  # a stripe across the image, not a shape
        if int((labels[rows, cols] == i).sum()) >= _DIRT:
            # a square window with a margin, in which templates are compared
            side = min(SIDE, max(high, wide) + 12)
            top, left = (min(max(0, (s.start + s.stop - side) // 2), SIDE - side) for s in (rows, cols))
            window = slice(top, top + side), slice(left, left + side)
            regions.append(_region(pixels[window], difference[window], labels[window] == i, left, top))
    if not any(r.color and r.shape for r in regions):
        return None
    level = float(ground.mean())
    word = min(GROUNDS, key=lambda g: abs(GROUNDS[g] - level))
    slope = float((ground[0] - ground[-1]).mean())
    return View(tuple(regions), word, slope / LIGHT)


def _region(pixels: np.ndarray, difference: np.ndarray, inside: np.ndarray, left: int, top: int) -> Region:
    """Return the region `inside` (S, S) of a window of the image, whose corner is at (`left`, `top`)."""
    rows, cols = np.nonzero(inside)
    x, y = float(cols.mean()) + 0.5, float(rows.mean()) + 0.5
    if len(rows) < _MIN_AREA:
        return Region(None, None, None, x + left, y + top)
    distance = abs(difference).max(2)
    strong = inside & (distance >= 0.8 * np.quantile(distance[inside & (distance > _CONTRAST)], 0.9))
    full = np.median(difference[strong], axis=0)
    part = ((difference @ full) / max(float(full @ full), 1e-6)).clip(0, 1)
    shape = sight.best_shape(inside.astype(float), x, y, SHAPES, _OVERLAP)
    return Region(_fill(part, inside), _color(pixels[strong]), shape, x + left, y + top)


def _holds(relation: str, a: Region, b: Region) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    right, down = RELATIONS[relation]
    return (dx * right > abs(dy)) if right else (dy * down > abs(dx))


def judge(image: Image.Image | np.ndarray, prompt: str) -> float:
    """Return the fraction of the caption's statements that hold in the image, in [0, 1].

    Statements are the number of shapes, each one's fill, colour and shape, the relations and the background,
    under the assignment of regions to shapes with the most matches.

    Args:
        image: a PIL image or an array (height, width, 3), uint8 or float in [0, 1]; sides other than 64
            pixels are resized.
        prompt: a caption of a patterned scene.

    Raises:
        ValueError: `prompt` is no caption of a patterned scene; it names the prompt.
    """
    told = parse(prompt)
    view = look(image)
    if view is None:
        return 0.0
    count = len(told.figures)
    slots: list[Region | None] = [*view.regions[:6], *[None] * (count - len(view.regions))]
    best = 0
    for pick in permutations(slots, count):
        right = sum(
            getattr(region, kind) == getattr(figure, kind)
            for region, figure in zip(pick, told.figures, strict=True)
            if region is not None
            for kind in ("fill", "color", "shape")
        )
        for relation, other in zip(told.relations, pick[1:], strict=True):
            right += pick[0] is not None and other is not None and _holds(relation, pick[0], other)
        best = max(best, right)
    total = 2 + 3 * count + len(told.relations)
    return (best + (len(view.regions) == count) + (view.ground == told.ground)) / total


def taste(image: Image.Image | np.ndarray, prompt: str = "") -> float:
    """Return how lit the background of an image is, from 0 (flat) to 1.

    Blank or noisy images score 0. Captions never state light; `prompt` is ignored and only gives both judges
    one signature.
    """
    view = look(image)
    return 0.0 if view is None else float(np.clip((view.light - 0.2) / 0.6, 0, 1))
