"""Duplicate images: equal bytes, or thumbnails that hardly differ.

Of generated images of 512 x 512, a JPEG of quality 40 and a copy with a quarter of the side differ from the
original by at most 4 levels of 255 in every value, and other images of the same prompt by 120 or more in
some. Unlike hashes of brightness the thumbnail keeps colours apart.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from diffalign.media.images import averaged, decode

SIDE = 16

Thumbnail = Int16[np.ndarray, "768"]
"""The red, green and blue of 16 x 16 fields, 0 to 255."""


def thumbnail(data: bytes) -> Thumbnail:
    """Return the thumbnail of an encoded image: each value the mean over a field, so that size and encoding
    hardly show. One of ``media.images.UNREADABLE`` is raised if it is none.
    """
    return averaged(decode(data), SIDE).astype(np.int16).reshape(-1)


def distinct(contents: Sequence[str]) -> list[int]:
    """Return the first of each group of equal contents, in order."""
    first: dict[str, int] = {}
    for index, content in enumerate(contents):
        first.setdefault(content, index)
    return list(first.values())


def unlike(thumbnails: Sequence[Thumbnail], levels: int) -> list[int]:
    """Those that differ from every earlier one that is kept by more than ``levels`` (of 255) in some value,
    in order.
    """
    kept: list[int] = []
    for index, one in enumerate(thumbnails):
        others = np.array([thumbnails[other] for other in kept])
        if not kept or (np.abs(others - one).max(1) > levels).all():
            kept.append(index)
    return kept
