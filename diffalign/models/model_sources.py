"""Source images of a loaded model, encoded as its family takes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffalign.models.codecs import Codec
from diffalign.models.families.sources import SourceImages, pictures


@dataclass(frozen=True)
class ModelSources:
    """A model's way with source images: its family's, by its own encoders.

    Attributes:
        pipeline: the diffusers pipeline.
        codec: how its autoencoder is called.
        how: the family's way.
    """

    pipeline: Any
    codec: Codec
    how: SourceImages

    @property
    def needed(self) -> bool:
        """Whether it draws nothing without one."""
        return self.how.needed

    @property
    def read(self) -> bool:
        """Whether its text encoder sees the source, so that a prompt is encoded together with it."""
        return self.how.read

    def size(self, target: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that the source of images of this size is cut to."""
        return self.how.size(target)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"], frames: int) -> dict[str, Tensor]:
        """Conditions by name, one row a source, of pixels in [-1, 1]; ``frames`` of a video, or 1."""
        return self.how.encode(self.pipeline, self.codec, pixels, frames)

    def encode_prompts(
        self, prompts: list[str], pixels: Sequence[UInt8[Tensor, "3 H W"]]
    ) -> dict[str, Tensor]:
        """Text conditions by name of prompts read with their sources, one row each."""
        return self.how.encode_prompts(self.pipeline, prompts, pictures(pixels))
