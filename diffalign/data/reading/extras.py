"""Cells of a row beside the label: rewards, weight maps, the weight of the group."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from diffalign.data.reading.examples import ImageRef
from diffalign.errors import UserError

Opener = Callable[[Any, str], ImageRef | None]
"""Makes an image of a cell: (value, place) to a reference, None where there is none in it."""


def read_rewards(value: Any, where: str, images: int) -> tuple[tuple[float, ...], ...]:
    """Return one tuple of numbers an image, or none at all; UserError for another number of them."""
    if value is None:
        return ()
    each = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if len(each) != images and images == 1:  # several rewards of one image need no second pair of brackets
        each = [each]
    rows = [tuple(one) if isinstance(one, list | tuple) else (one,) for one in each]
    sizes = {len(one) for one in rows}
    numbers = all(isinstance(n, int | float) and math.isfinite(n) for one in rows for n in one)
    if len(rows) != images or len(sizes) != 1 or not numbers or 0 in sizes:
        raise UserError(
            f"{where}: rewards is {str(value)[:60]}; allowed: for each of the {images} images a number, or "
            f"equally long lists of numbers"
        )
    return tuple(tuple(float(n) for n in one) for one in rows)


def read_patches(value: Any, where: str, images: int, image: Opener) -> tuple[ImageRef | None, ...]:
    """Return the weight map of each image, or none at all; UserError for another number of them."""
    if value is None:
        return ()
    each = list(value) if isinstance(value, list | tuple) else [value]
    if len(each) != images:
        raise UserError(f"{where}: {len(each)} patches for {images} images; allowed: a map or null for each")
    return tuple(image(one, f"{where}, column 'patches'") for one in each)


def read_maps(patches: Any, mask: Any, where: str, images: int, image: Opener) -> tuple[ImageRef | None, ...]:
    """Return the weight map of each image, or none at all: those of a column ``patches``, or the one of a
    column ``mask`` for all images of the row; UserError for both, or another number of patches.
    """
    if mask is None:
        return read_patches(patches, where, images, image)
    if patches is not None:
        raise UserError(f"{where}: the row has a mask and patches; allowed: one of the two columns")
    reference = image(mask, f"{where}, column 'mask'")
    return () if reference is None else (reference,) * images


def read_time_labels(value: Any, where: str) -> tuple[int, ...]:
    """Return the labels of a pair in intervals of time, or none; UserError for what is not -1, 0 or 1."""
    if value is None:
        return ()
    each = list(value) if isinstance(value, list | tuple) else [value]
    if not each or any(isinstance(one, bool) or one not in (-1, 0, 1) for one in each):
        raise UserError(f"{where}: time_labels is {str(value)[:60]}; allowed: a list of 1, -1 and 0")
    return tuple(int(one) for one in each)


def read_weight(value: Any, where: str) -> float:
    """Return the weight of a group, 1 where none is given; UserError for what is below 0."""
    if value is None or value == "":
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # csv has texts
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise UserError(f"{where}: weight is {repr(value)[:60]}; allowed: a number from 0 on")
    return weight
