"""Image pre-processing of reward networks: crop, resize and normalise, in PIL and plain torch.

It is implemented here so that neither torchvision nor a processor's defaults can change a score. PIL images
take the exact path, that of the published code. Tensors take a differentiable path: bicubic with antialiasing
(without it the scores differ), in float32, clamped to [0, 1]. ``Letterbox`` has one path for both, since its
published code resizes tensors.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Num
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffalign.rewards.images import Images
from diffalign.utils.transfer import sent

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """Return (height, width): the short side is ``size``, the long side rounded down, as processors do."""
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def as_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Return an image as float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1).float() / 255


def scaled(
    pixels: Num[Tensor, "B 3 H W"], height: int, width: int, antialias: bool = True
) -> Float[Tensor, "B 3 height width"]:
    """Resize bicubically to (height, width) in float32, unclamped; pixels of that size are unchanged."""
    pixels = pixels.float()
    if (height, width) == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=antialias)


@dataclass(frozen=True)
class Crop:
    """Resize the short side to ``size``, crop the centre, normalise: the pre-processing of CLIP and BLIP.

    The PIL path is bit-identical to transformers' PIL processor of CLIP. The tensor path differs from it only
    by the rounding to 8 bits.

    Attributes:
        size: side of the square, in pixels.
        mean: mean of pixels in [0, 1], by channel.
        std: standard deviation of pixels in [0, 1], by channel.
        to_even: rounding of a crop offset that ends in 1/2: to the even neighbour, as torchvision does, or
            (False) down, as transformers does.
        antialias: whether to resize with antialiasing. False takes the tensor path for PIL images too.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    to_even: bool = False
    antialias: bool = True

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return the normalised network input, float32 on ``device``; differentiable for tensors."""
        return normalised(self.crops(images, device), self.mean, self.std)

    def crops(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return the crops in [0, 1], before normalisation."""
        return _either(images, device, self.pil, self.pixels)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Return crops in [0, 1] of PIL images: the exact path."""
        rows = []
        for image in images if not self.antialias else ():  # PIL always antialiases, so resize as a tensor
            rows.append(self.pixels(as_tensor(image.convert("RGB"))[None])[0])
        for image in images if self.antialias else ():
            height, width = resized(image.height, image.width, self.size)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            top, left = self._corner(height, width)
            rows.append(as_tensor(small.crop((left, top, left + self.size, top + self.size))))
        return torch.stack(rows)

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Return crops in [0, 1] of pixels in [0, 1]; differentiable."""
        height, width = resized(pixels.shape[2], pixels.shape[3], self.size)
        top, left = self._corner(height, width)
        image = scaled(pixels, height, width, self.antialias).clamp(0, 1)
        return image[:, :, top : top + self.size, left : left + self.size]

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Return (top, left) of the crop."""
        rounded = round if self.to_even else math.floor
        return rounded((height - self.size) / 2), rounded((width - self.size) / 2)


@dataclass(frozen=True)
class Letterbox:
    """Resize the long side to ``size``, pad to a square with black, normalise: the pre-processing of HPS v2.

    The published code converts the 8-bit image to a tensor and resizes that without clamping bicubic
    overshoot (tgxs002/HPSv2, light augmentation). So PIL images and tensors share one path, and an image
    scores exactly as its pixels.

    Attributes:
        size: side of the square, in pixels.
        mean: mean of pixels in [0, 1], by channel.
        std: standard deviation of pixels in [0, 1], by channel.
        antialias: False resizes as torchvision before 0.17 did, with which the published numbers were made.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    antialias: bool = True

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return the normalised network input, float32 on ``device``; differentiable for tensors."""
        return normalised(_either(images, device, self.pil, self.pixels), self.mean, self.std)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Return squares of PIL images, in [0, 1] up to bicubic overshoot."""
        return torch.cat([self.pixels(as_tensor(image)[None]) for image in images])

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Return squares of pixels in [0, 1], in [0, 1] up to bicubic overshoot; differentiable."""
        factor = self.size / max(pixels.shape[2:])
        height, width = (max(1, round(side * factor)) for side in pixels.shape[2:])
        top, left = (self.size - height) // 2, (self.size - width) // 2
        edges = (left, self.size - width - left, top, self.size - height - top)
        return F.pad(scaled(pixels, height, width, self.antialias), edges)


@dataclass(frozen=True)
class Stretch:
    """Resize both sides to ``size`` regardless of the aspect ratio, normalise: the pre-processing of SigLIP.

    The PIL path is bit-identical to transformers' PIL processor of SigLIP. The tensor path differs from it
    only by the rounding to 8 bits.
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return the normalised network input, float32 on ``device``; differentiable for tensors."""
        return normalised(_either(images, device, self.pil, self.pixels), self.mean, self.std)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Return squares in [0, 1] of PIL images: the exact path."""
        size = (self.size, self.size)
        return torch.stack(
            [as_tensor(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
        )

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Return squares in [0, 1] of pixels in [0, 1]; differentiable."""
        return scaled(pixels, self.size, self.size).clamp(0, 1)


def _either(
    images: Images,
    device: torch.device | str,
    pil: Callable[[Sequence[Image.Image]], Tensor],
    pixels: Callable[[Tensor], Tensor],
) -> Tensor:
    """Apply ``pixels`` to a tensor or ``pil`` to PIL images; the result is on ``device``."""
    return pixels(images.to(device)) if isinstance(images, Tensor) else pil(images).to(device)


def normalised(pixels: Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (pixels - mean) / std by channel."""
    centre, spread = (sent(torch.tensor(value), pixels.device).view(1, 3, 1, 1) for value in (mean, std))
    return (pixels - centre) / spread
