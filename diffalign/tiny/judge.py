"""Two judges that read pixels: does the picture show what the caption says, and is it vivid?

No network: the background is the median of the border, things are connected regions that differ from it, a
colour is the nearest hue of the palette, a shape the template of equal area and place with the best overlap,
a size an area. Pictures without a plain border (noise, stripes) or without things score 0.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image

from diffalign.tiny.scenes import COLORS, RELATIONS, SHAPES, SIDE, parse_things

_CONTRAST = 0.13  # a pixel this far from the background belongs to a thing
_MIN_AREA = 10.0  # pixels; smaller regions are specks
_OVERLAP = 0.76  # intersection over union that a shape must reach
_LARGE = 58.0  # pixels of area from which a thing is large
_CHROMA = 0.12  # largest minus smallest channel that a colour must reach
_HUE = 27.0  # degrees that a hue may be off
_WASHED, _VIVID = 0.55, 0.92  # chroma relative to the palette's where taste is 0 and 1


@dataclass(frozen=True)
class Seen:
    """A region as the judge sees it; a word is None where the pixels do not support any."""

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
    """Row and column indices of each 4-connected region of a boolean image."""
    todo = mask.copy()
    found = []
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
        found.append((rows, cols))
    return found


@lru_cache(maxsize=1)
def _grid() -> np.ndarray:
    return (np.arange(SIDE * 3) + 0.5) / 3  # three sample points to a pixel and axis


def _template(shape: str, x: float, y: float, area: float) -> np.ndarray:
    """Coverage of each pixel by the shape with this centre of mass and area, in [0, 1]."""
    gx, gy = _grid()[None, :] - x, _grid()[:, None] - y
    if shape == "circle":
        inside = gx**2 + gy**2 <= area / np.pi
    elif shape == "square":
        half = np.sqrt(area) / 2
        inside = (abs(gx) <= half) & (abs(gy) <= half)
    else:
        wide, high = SHAPES["triangle"]
        r = np.sqrt(area / (2 * wide * high))
        top = -4 / 3 * high * r  # the centre of mass is two thirds down
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
    """Hue in degrees of colours (..., 3)."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    return np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360


def _hue_distance(rgb: np.ndarray, color: str) -> np.ndarray:
    return abs((_hue(rgb) - _hue(np.array(COLORS[color])) + 180) % 360 - 180)


def _color(core: np.ndarray) -> tuple[str | None, float]:
    """Colour word and relative chroma of a region's inner pixels (n, 3)."""
    rgb = np.median(core, axis=0)
    chroma = float(rgb.max() - rgb.min())
    best = min(COLORS, key=lambda c: float(_hue_distance(rgb, c)))
    relative = chroma / (max(COLORS[best]) - min(COLORS[best]))
    if chroma < _CHROMA or _hue_distance(rgb, best) > _HUE or (_hue_distance(core, best) < 45).mean() < 0.7:
        return None, relative
    return best, relative


def look(image: Image.Image | np.ndarray) -> list[Seen]:
    """Return the things in a picture; none at all if its border is not plain."""
    pixels = _pixels(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    if (abs(border - ground).max(1) < 0.15).mean() < 0.8 or ground.max() - ground.min() > 0.2:
        return []
    far = abs(pixels - ground).max(2)
    seen = []
    for rows, cols in _regions(far > _CONTRAST):
        away = pixels[rows, cols]
        inner = far[rows, cols] >= 0.8 * np.quantile(far[rows, cols], 0.9)
        full = np.median(away[inner], axis=0) - ground
        part = ((away - ground) @ full / max(float(full @ full), 1e-6)).clip(0, 1)
        if part.sum() < _MIN_AREA:
            continue
        if max(np.ptp(rows), np.ptp(cols)) == SIDE - 1:
            return []  # a stripe, not a thing
        cover = np.zeros((SIDE, SIDE))
        cover[rows, cols] = part
        x, y = float(part @ (cols + 0.5) / part.sum()), float(part @ (rows + 0.5) / part.sum())
        color, chroma = _color(away[inner])
        size = "large" if part.sum() > _LARGE else "small"
        seen.append(Seen(size, color, _shape(cover, x, y), x, y, chroma))
    return seen if any(s.color and s.shape for s in seen) else []


def _holds(relation: str, a: Seen, b: Seen) -> bool:
    dx, dy = a.x - b.x, a.y - b.y
    right, down = RELATIONS[relation]
    return (dx * right > abs(dy)) if right else (dy * down > abs(dx))


def judge(image: Image.Image | np.ndarray, prompt: str) -> float:
    """Fraction of the caption's statements that hold in the picture, 0 to 1.

    Statements are the number of things, each thing's size, colour and shape, and the relation, under the
    assignment of regions to things that is best for the picture. `image` is a PIL image or an array (height,
    width, 3), uint8 or float in [0, 1]; other sides than 32 pixels are resized. ValueError naming the prompt
    if it is not a scene caption.
    """
    things, relation = parse_things(prompt)
    seen = look(image)
    if not seen:
        return 0.0
    best = 0
    slots: list[Seen | None] = [*seen[:6], *[None] * (len(things) - len(seen))]
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
    return (best + (len(seen) == len(things))) / total


def taste(image: Image.Image | np.ndarray, prompt: str = "") -> float:
    """How vivid the picture is: 0 washed out to 1 vivid, the mean over its things; 0 for a blank or noisy
    picture.

    No caption names it, and `prompt` is not read: it is there so that both judges are called alike.
    """
    values = [s.chroma for s in look(image) if s.color is not None]
    if not values:
        return 0.0
    return float(np.mean(np.clip((np.array(values) - _WASHED) / (_VIVID - _WASHED), 0, 1)))
