"""Find duplicate images: equal bytes, or thumbnails with small differences.

For generated images of 512 x 512, the thumbnails of a JPEG of quality 40 and of a copy with a quarter of the
side differ from the original's by at most 4 of 255 levels in every value; those of other images of the prompt
differ by 120 or more in some value. Unlike hashes of brightness, thumbnails distinguish colours.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int16

from diffalign.media.images import averaged, decode

SIDE = 16

Thumbnail = Int16[np.ndarray, "768"]
"""Mean red, green and blue of 16 x 16 boxes, in [0, 255], flattened."""


def thumbnail(data: bytes) -> Thumbnail:
    """Return the thumbnail of an encoded image (see ``media.images.averaged``).

    Raises:
        one of ``media.images.UNREADABLE``: it is no image.
    """
    return averaged(decode(data), SIDE).astype(np.int16).reshape(-1)


def distinct(contents: Sequence[str]) -> list[int]:
    """Return the index of the first of each group of equal contents, ascending."""
    first: dict[str, int] = {}
    for index, content in enumerate(contents):
        first.setdefault(content, index)
    return list(first.values())


def dissimilar(thumbnails: Sequence[Thumbnail], levels: int) -> list[int]:
    """Return the indices of thumbnails that are no near duplicates of an earlier returned one, ascending.

    Two are near duplicates if all values differ by at most ``levels`` (of 255).
    """
    distinct_ones: list[int] = []
    for index, candidate in enumerate(thumbnails):
        others = np.array([thumbnails[other] for other in distinct_ones])
        if not distinct_ones or (np.abs(others - candidate).max(1) > levels).all():
            distinct_ones.append(index)
    return distinct_ones
