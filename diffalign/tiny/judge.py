"""Two rule-based judges of drawn scenes: agreement with the caption (`judge`), and vividness (`taste`).

They use no network. The background is the median of the border. Things are connected regions that differ from
it. A colour is the nearest hue of the palette, a shape is the template of equal area and place with the best
overlap, and a size is an area. Images without a uniform border (noise, stripes) or without things score 0.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

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


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must have shape (height, width, 3), got {image.shape}")
        if image.dtype == np.uint8:
            array = image.astype(np.float32) / 255
        else:
            array = np.nan_to_num(image.astype(np.float32)).clip(0, 1)
        if array.shape[:2] == (SIDE, SIDE):
            return array
        image = Image.fromarray((array * 255).round().astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def _regions(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the row and column indices of each 4-connected region of a boolean image."""
    todo = mask.copy()
    regions = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not todo[start]:
            continue
        stack, cells = [start], []
        todo[start] = False
        while stack:
            i, j = stack.pop()
            cells.append((i, j))
            for a, b in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if 0 <= a < SIDE and 0 <= b < SIDE and todo[a, b]:
                    todo[a, b] = False
                    stack.append((a, b))
        rows, cols = np.array(cells).T
        regions.append((rows, cols))
    return regions


@lru_cache(maxsize=1)
def _grid() -> np.ndarray:
    return (np.arange(SIDE * 3) + 0.5) / 3  # three sample points a pixel along each axis


def _template(shape: str, x: float, y: float, area: float) -> np.ndarray:
    """Return the coverage of each pixel, in [0, 1], by the shape with this centre of mass and area."""
    gx, gy = _grid()[None, :] - x, _grid()[:, None] - y
    if shape == "circle":
        inside = gx**2 + gy**2 <= area / np.pi
    elif shape == "square":
        half = np.sqrt(area) / 2
        inside = (abs(gx) <= half) & (abs(gy) <= half)
    else:
        wide, high = SHAPES["triangle"]
        r = np.sqrt(area / (2 * wide * high))
        top = -4 / 3 * high * r  # the centre of mass is two thirds of the height below the apex
        inside = (gy <= 2 / 3 * high * r) & (abs(gx) <= (gy - top) * wide / (2 * high))
    return inside.reshape(SIDE, 3, SIDE, 3).mean((1, 3))


def _shape(cover: np.ndarray, x: float, y: float) -> str | None:
    def overlap(shape: str) -> float:
        other = _template(shape, x, y, float(cover.sum()))
        return float(np.minimum(cover, other).sum() / np.maximum(cover, other).sum())

    scores = {shape: overlap(shape) for shape in SHAPES}
    best = max(scores, key=lambda s: scores[s])
    return best if scores[best] >= _OVERLAP else None


def _hue(rgb: np.ndarray) -> np.ndarray:
    """Return the hues in degrees of colours (..., 3)."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def _hue_distance(rgb: np.ndarray, color: str) -> np.ndarray:
    return abs((_hue(rgb) - _hue(np.array(COLORS[color])) + 180) % 360 - 180)


def _color(core: np.ndarray) -> tuple[str | None, float]:
    """Return the colour word and the relative chroma of a region's inner pixels (n, 3)."""
    rgb = np.median(core, axis=0)
    chroma = float(rgb.max() - rgb.min())
    best = min(COLORS, key=lambda c: float(_hue_distance(rgb, c)))
    relative = chroma / (max(COLORS[best]) - min(COLORS[best]))
    if chroma < _CHROMA or _hue_distance(rgb, best) > _HUE or (_hue_distance(core, best) < 45).mean() < 0.7:
        return None, relative
    return best, relative


def look(image: Image.Image | np.ndarray) -> list[Region]:
    """Detect the things in an image; an image without a uniform border has none."""
    pixels = _pixels(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if (abs(border - ground).max(1) < 0.15).mean() < 0.8 or ground.max() - ground.min() > 0.2:
        return []
    distance = abs(pixels - ground).max(2)
    things = []
    for rows, cols in _regions(distance > _CONTRAST):
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
        things.append(Region(size, color, _shape(cover, x, y), x, y, chroma))
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
