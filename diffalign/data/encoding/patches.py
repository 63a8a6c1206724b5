"""Weight maps of images: a grey image or a numpy array, cropped as its image, averaged over latent cells."""

from io import BytesIO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffalign.data.encoding.geometry import Cut, Size
from diffalign.media.images import opened

NUMPY = b"\x93NUMPY"


def read_map(content: bytes) -> Tensor:
    """Return the map of a file, (h, w) float32, 0 or more; white in an image file is 1.

    Raises one of ``images.UNREADABLE`` if the file is no map: not an array of two axes, negative, not finite.
    """
    if content.startswith(NUMPY):
        values = np.load(BytesIO(content), allow_pickle=False)
        values = values[0] if values.ndim == 3 and len(values) == 1 else values
    else:
        with opened(content) as image:
            image.load()
            deep = image.mode.startswith("I")
            values = np.asarray(image if deep else image.convert("L")) / (65535 if deep else 255)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "bfiu":
        raise ValueError(f"an array of {values.dtype} {values.shape}; a map is numbers (height, width)")
    weights = torch.from_numpy(np.asarray(values, dtype=np.float32).copy())
    if not weights.isfinite().all() or weights.min() < 0:
        raise ValueError("weights of a map are finite and not negative")
    return weights


def cut_map(weights: Tensor, cut: Cut) -> Tensor:
    """Return the crop, (H, W) of the cut's target size, of a map (h, w) of the whole image."""
    (top, left), (height, width) = cut.corner, cut.target
    return pool(weights, cut.resized)[top : top + height, left : left + width]


def pool(weights: Tensor, size: Size) -> Tensor:
    """Return a map (h, w) averaged over the cells of another size (area)."""
    return interpolate(weights[None, None], size=size, mode="area")[0, 0]
