"""Images as the networks of rewards take them: cut, scaled and normalised, in PIL and plain torch.

Done here, so that neither torchvision nor a processor's defaults can change a score. PIL images take the
exact path, which is that of the published code; pixels given as a tensor take a differentiable one: bicubic
and antialiased (without antialiasing the score is another one), in float32, clamped to [0, 1]. ``Letterbox``
is the one whose published code itself works on tensors, so there the two are one.
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

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def resized(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) with the short side at ``size`` and the long side rounded down, as processors do."""
    short, long = min(height, width), max(height, width)
    other = int(size * long / short)
    return (size, other) if height <= width else (other, size)


def as_tensor(image: Image.Image) -> Float[Tensor, "3 H W"]:
    """Return an image as float32 in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.uint8)).permute(2, 0, 1).float() / 255


def scaled(
    pixels: Num[Tensor, "B 3 H W"], height: int, width: int, antialias: bool = True
) -> Float[Tensor, "B 3 height width"]:
    """Bicubic, float32, not clamped; pixels of that size are left as they are."""
    pixels = pixels.float()
    if (height, width) == tuple(pixels.shape[2:]):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=antialias)


@dataclass(frozen=True)
class Crop:
    """Short side to ``size``, centre crop, then (x - mean) / std by channel: CLIP's and BLIP's.

    The PIL path is bit-identical to transformers' PIL processor of CLIP. The tensor path differs from it by
    the 8-bit rounding alone.

    Attributes:
        size: pixels of the square's side.
        mean: of pixels, by channel.
        std: likewise.
        to_even: where the centre lies between two pixels, whether the cut begins at the even one of them, as
            torchvision's does, or at the first, as transformers' does.
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    to_even: bool = False
    antialias: bool = True

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return what the network takes, float32 on ``device``; gradients flow to pixels given as a
        tensor.
        """
        return normalised(self.crops(images, device), self.mean, self.std)

    def crops(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return the same in [0, 1], not yet normalised."""
        return _either(images, device, self.pil, self.pixels)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Crops in [0, 1] of PIL images; the exact path."""
        rows = []
        for image in images if not self.antialias else ():  # PIL always antialiases: as pixels
            rows.append(self.pixels(as_tensor(image.convert("RGB"))[None])[0])
        for image in images if self.antialias else ():
            height, width = resized(image.height, image.width, self.size)
            small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
            top, left = self._corner(height, width)
            rows.append(as_tensor(small.crop((left, top, left + self.size, top + self.size))))
        return torch.stack(rows)

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Crops in [0, 1] of pixels in [0, 1]; differentiable."""
        height, width = resized(pixels.shape[2], pixels.shape[3], self.size)
        top, left = self._corner(height, width)
        whole = scaled(pixels, height, width, self.antialias).clamp(0, 1)
        return whole[:, :, top : top + self.size, left : left + self.size]

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """(top, left) of the cut."""
        cut = round if self.to_even else math.floor
        return cut((height - self.size) / 2), cut((width - self.size) / 2)


@dataclass(frozen=True)
class Letterbox:
    """Long side to ``size``, black beside or above and below, then (x - mean) / std by channel: HPS v2's.

    The published code makes a tensor of the 8-bit image first and resizes that, without clamping what bicubic
    overshoots (tgxs002/HPSv2, light augmentation); so PIL images and pixels take one path here, and an image
    scores exactly as its pixels. ``antialias`` False is what torchvision did to tensors when the published
    numbers were made (before 0.17).
    """

    size: int
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    antialias: bool = True

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return what the network takes, float32 on ``device``; gradients flow to pixels given as a
        tensor.
        """
        return normalised(_either(images, device, self.pil, self.pixels), self.mean, self.std)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Squares in about [0, 1] of PIL images; the exact path."""
        return torch.cat([self.pixels(as_tensor(image)[None]) for image in images])

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Squares in about [0, 1] of pixels in [0, 1]; differentiable."""
        factor = self.size / max(pixels.shape[2:])
        height, width = (max(1, round(side * factor)) for side in pixels.shape[2:])
        top, left = (self.size - height) // 2, (self.size - width) // 2
        edges = (left, self.size - width - left, top, self.size - height - top)
        return F.pad(scaled(pixels, height, width, self.antialias), edges)


@dataclass(frozen=True)
class Stretch:
    """Both sides to ``size`` whatever the aspect, then (x - mean) / std by channel: SigLIP's.

    The PIL path is bit-identical to transformers' PIL processor of SigLIP. The tensor path differs from it by
    the 8-bit rounding alone.
    """

    size: int
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __call__(self, images: Images, device: torch.device | str = "cpu") -> Float[Tensor, "B 3 size size"]:
        """Return what the network takes, float32 on ``device``; gradients flow to pixels given as a
        tensor.
        """
        return normalised(_either(images, device, self.pil, self.pixels), self.mean, self.std)

    def pil(self, images: Sequence[Image.Image]) -> Float[Tensor, "B 3 size size"]:
        """Squares in [0, 1] of PIL images; the exact path."""
        size = (self.size, self.size)
        return torch.stack(
            [as_tensor(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
        )

    def pixels(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 size size"]:
        """Squares in [0, 1] of pixels in [0, 1]; differentiable."""
        return scaled(pixels, self.size, self.size).clamp(0, 1)


def _either(
    images: Images,
    device: torch.device | str,
    pil: Callable[[Sequence[Image.Image]], Tensor],
    pixels: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what ``pixels`` makes of a tensor on ``device``, or ``pil`` of PIL images, then on
    ``device``.
    """
    return pixels(images.to(device)) if isinstance(images, Tensor) else pil(images).to(device)


def normalised(pixels: Float[Tensor, "B 3 H W"], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(pixels - mean) / std by channel."""
    middle = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    return (pixels - middle) / torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
