"""JPEG compressibility and incompressibility, the tasks of DDPO (arXiv 2305.13301, section 5.1).

The score is the size of the JPEG in kilobytes (1000 bytes) at quality 95, with Pillow's default 4:2:0
subsampling. It varies by about 1 % between versions of libjpeg. Flow-GRPO and DiffusionNFT also divide by
500; an ensemble with weight 0.002 reproduces theirs.
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
    """Return the size of the image as JPEG, in kilobytes of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=quality)
    return buffer.tell() / 1000


@dataclass(frozen=True)
class JpegSize:
    """The size of the JPEG in kilobytes, times ``sign``."""

    sign: int
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32; prompts are ignored."""
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return torch.tensor([self.sign * jpeg_kilobytes(image) for image in to_pil(images)])


def compressibility(source: str | None, place: Place) -> JpegSize:
    """Return the reward of compressibility: minus the kilobytes."""
    no_source("jpeg", source)
    return JpegSize(-1, place.batch_size)


def incompressibility(source: str | None, place: Place) -> JpegSize:
    """Return the reward of incompressibility: the kilobytes."""
    no_source("jpeg_incompressibility", source)
    return JpegSize(1, place.batch_size)
