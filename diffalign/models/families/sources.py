"""How families take a source image: what a picture is edited, or a video continued, from.

A source becomes conditions like those of a prompt, encoded once and given to the network in every call; so
training, rollouts and diagnostics need to know nothing of it. Families say what these conditions are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from diffalign.diffusion import first_frame
from diffalign.errors import UserError
from diffalign.models.codecs import Codec

Size = tuple[int, int]
"""(height, width) in pixels."""

SOURCE = "source"
"""The name of the condition that holds a source's latents, (B, C, h, w)."""


@runtime_checkable
class SourceImages(Protocol):
    """How a family takes a source image."""

    @property
    def needed(self) -> bool:
        """Whether the stock pipeline draws nothing without one."""
        ...

    @property
    def read(self) -> bool:
        """Whether the text encoder sees it, so that a prompt is encoded together with its source."""
        ...

    @property
    def usual(self) -> bool:
        """Whether its models are made for sources, so that memory is estimated with one."""
        ...

    @property
    def batched(self) -> bool:
        """Whether the stock pipeline takes a source for each prompt of a batch; else it draws one by one."""
        ...

    def size(self, target: Size) -> Size:
        """Return the size that the source of an image of this size is cut to."""
        ...

    def encode(
        self, pipeline: Any, codec: Codec, pixels: Float[Tensor, "B 3 H W"], frames: int
    ) -> dict[str, Tensor]:
        """Return conditions, one row a source, of pixels in [-1, 1]; ``frames`` of a video, or 1."""
        ...

    def encode_prompts(
        self, pipeline: Any, prompts: list[str], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Return text conditions of prompts read together with their sources, one row each, float32."""
        ...

    def shapes(self, latents: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of one source's conditions beside latents of this shape."""
        ...


class TakesSources(Protocol):
    """What a family says of source images."""

    @property
    def sources(self) -> SourceImages | None:
        """How it takes a source image; None: it takes none."""
        ...


class NoSources:
    """A family that takes no source image."""

    sources: ClassVar[SourceImages | None] = None


@dataclass(frozen=True)
class AsLatents:
    """A source whose latents, the autoencoder's mean, stand beside the noisy ones in the network.

    Attributes:
        needed: whether the stock pipeline draws nothing without one.
        usual: whether its models are made for sources.
        batched: whether it takes a source for each prompt of a batch.
    """

    needed: bool = False
    usual: bool = False
    batched: bool = False
    read: bool = False

    def size(self, target: Size) -> Size:
        """Return the image's own."""
        return target

    def encode(
        self, pipeline: Any, codec: Codec, pixels: Float[Tensor, "B 3 H W"], frames: int
    ) -> dict[str, Tensor]:
        """``source`` (B, C, h, w) in the network's scale, float32."""
        return {SOURCE: codec.encode(pipeline.vae, pixels)[0]}

    def encode_prompts(
        self, pipeline: Any, prompts: list[str], images: Sequence[Image.Image]
    ) -> dict[str, Tensor]:
        """Raise ValueError: the prompt is read alone."""
        raise ValueError("the text encoder does not see the source")

    def shapes(self, latents: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return the latents' own."""
        return {SOURCE: latents}


@dataclass(frozen=True)
class GivenFrame(AsLatents):
    """A source that is the first latent frame of the video, which the network sees clean."""

    needed: bool = True
    usual: bool = True

    def encode(
        self, pipeline: Any, codec: Codec, pixels: Float[Tensor, "B 3 H W"], frames: int
    ) -> dict[str, Tensor]:
        """``first_frame`` (B, C, 1, h, w) in the network's scale, float32.

        Raises:
            UserError: one frame, which is the source's.
        """
        if frames < 2:
            raise UserError(
                f"{frames} frame with an image-to-video model whose first one is the source; allowed: a "
                "video of more (data.frames)"
            )
        return {first_frame.NAME: codec.encode(pipeline.vae, pixels[:, :, None])[0]}

    def shapes(self, latents: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
        """Return one latent frame's."""
        return {first_frame.NAME: (latents[0], 1, *latents[2:])}


def pictures(pixels: Sequence[UInt8[Tensor, "3 H W"]]) -> list[Image.Image]:
    """Return uint8 pixels as images."""
    return [Image.fromarray(one.permute(1, 2, 0).cpu().numpy()) for one in pixels]
