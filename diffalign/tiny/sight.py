"""What the rule-based judges of drawn images share: pixels, regions, templates of shapes, hues."""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from PIL import Image


def pixels(image: Image.Image | np.ndarray, side: int) -> np.ndarray:
    """Return the pixels (side, side, 3), float32 in [0, 1], of an image, which is resized if needed.

    Raises:
        ValueError: an array is not of shape (height, width, 3).
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image must have shape (height, width, 3), got {image.shape}")
        if image.dtype == np.uint8:
            array = image.astype(np.float32) / 255
        else:
            array = np.nan_to_num(image.astype(np.float32)).clip(0, 1)
        if array.shape[:2] == (side, side):
            return array
        image = Image.fromarray((array * 255).round().astype(np.uint8))
    image = image.convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def regions(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the row and column indices of each 4-connected region of a boolean image."""
    height, width = mask.shape
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
                if 0 <= a < height and 0 <= b < width and todo[a, b]:
                    todo[a, b] = False
                    stack.append((a, b))
        rows, cols = np.array(cells).T
        found.append((rows, cols))
    return found


@lru_cache(maxsize=2)
def _grid(side: int) -> np.ndarray:
    return (np.arange(side * 3) + 0.5) / 3  # three sample points a pixel along each axis


def template(
    shape: str, halves: tuple[float, float], x: float, y: float, area: float, side: int
) -> np.ndarray:
    """Return the coverage of each pixel, in [0, 1], by the shape with this centre of mass and area.

    `halves` are half width and half height by radius. A circle's are equal; a triangle's apex is at the top;
    a diamond's corners are on the axes; another shape is a rectangle.
    """
    gx, gy = _grid(side)[None, :] - x, _grid(side)[:, None] - y
    wide, high = halves
    if shape == "circle":
        inside = gx**2 + gy**2 <= area / np.pi
    elif shape == "triangle":
        r = np.sqrt(area / (2 * wide * high))
        top = -4 / 3 * high * r  # the centre of mass is two thirds of the height below the apex
        inside = (gy <= 2 / 3 * high * r) & (abs(gx) <= (gy - top) * wide / (2 * high))
    elif shape == "diamond":
        r = np.sqrt(area / (2 * wide * high))
        inside = abs(gx) / wide + abs(gy) / high <= r
    else:
        half = np.sqrt(area) / 2
        inside = (abs(gx) <= half * np.sqrt(wide / high)) & (abs(gy) <= half * np.sqrt(high / wide))
    cover: np.ndarray = inside.reshape(side, 3, side, 3).mean((1, 3))
    return cover


def best_shape(
    cover: np.ndarray, x: float, y: float, shapes: Mapping[str, tuple[float, float]], least: float
) -> str | None:
    """Return the shape whose template overlaps most with a coverage (H, H), None below `least`.

    The overlap is the intersection over the union.
    """

    def overlap(shape: str) -> float:
        other = template(shape, shapes[shape], x, y, float(cover.sum()), len(cover))
        return float(np.minimum(cover, other).sum() / np.maximum(cover, other).sum())

    scores = {shape: overlap(shape) for shape in shapes}
    best = max(scores, key=lambda s: scores[s])
    return best if scores[best] >= least else None


def hue(rgb: np.ndarray) -> np.ndarray:
    """Return the hues in degrees of colours (..., 3)."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    degrees: np.ndarray = np.degrees(np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b)) % 360
    return degrees


def hue_distance(rgb: np.ndarray, other: tuple[float, float, float]) -> np.ndarray:
    """Return the differences of hue in degrees, in [0, 180], of colours (..., 3) to one."""
    distance: np.ndarray = abs((hue(rgb) - hue(np.array(other)) + 180) % 360 - 180)
    return distance
