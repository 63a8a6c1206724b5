"""Perceptual hashes of images: near duplicates have hashes of few differing bits.

dHash (Krawetz, "Kind of Like That", 2013): the image is made grey and shrunk to 9 x 8 pixels;
each of the 64 bits says whether a pixel is darker than its right neighbour. Compression, scaling and small
changes of brightness leave nearly all bits.
"""

import numpy as np
from PIL import Image

_SIDE = 8
_ONES = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


def dhash(image: Image.Image) -> int:
    """Return the difference hash of an image, 64 bits."""
    grey = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, np.int16)
    bits = pixels[:, :-1] < pixels[:, 1:]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the number of differing bits of uint64 hashes, of shapes that broadcast: int64."""
    differing = np.ascontiguousarray(np.bitwise_xor(one, other))
    return _ONES[differing[..., None].view(np.uint8)].sum(-1, dtype=np.int64)
