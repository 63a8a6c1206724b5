"""How well an image compresses: DDPO's tasks (arXiv 2305.13301, section 5.1).

Kilobytes (1000 bytes) of the JPEG at quality 95 with Pillow's default 4:2:0 subsampling. The size depends a
little on the libjpeg at hand (about 1 %). Flow-GRPO and DiffusionNFT divide by 500 on top; here it is plain
kilobytes (an ensemble with the weight 0.002 gives theirs).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place, no_source


def jpeg_kilobytes(image: Image.Image, quality: int = 95) -> float:
    """Size of the image as JPEG, in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


@dataclass(frozen=True)
class JpegSize:
    """``sign`` times the kilobytes of the JPEG."""

    sign: int
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; prompts are not read."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return torch.tensor([self.sign * jpeg_kilobytes(image) for image in to_pil(images)])


def compressibility(source: str | None, place: Place) -> JpegSize:
    """Small files score high: minus the kilobytes."""
    no_source("jpeg", source)
    return JpegSize(-1, place.batch_size)


def incompressibility(source: str | None, place: Place) -> JpegSize:
    """Large files score high: plus the kilobytes."""
    no_source("jpeg_incompressibility", source)
    return JpegSize(1, place.batch_size)
