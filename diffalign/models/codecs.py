"""Codecs between pixels and latents: an autoencoder of images, one of images called frame by frame, or one of
videos.

A codec defines the shape of latents: (B, C, h, w) of images, (B, C, F, h, w) of videos, whatever order of
axes the network takes. Latents are in the scale that the network sees, (z - shift) scale of the autoencoder's
own z.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.models.precision import vae_precision

Config = Mapping[str, Any]


@runtime_checkable
class Codec(Protocol):
    """An autoencoder's shapes, encoding and decoding. ``config`` is the autoencoder's configuration."""

    @property
    def video(self) -> bool:
        """Whether pixels and latents have a frame axis, (B, C, F, H, W)."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the autoencoder is kept in float32, whatever the run's dtype."""
        ...

    def channels(self, config: Config) -> int:
        """C of the latents."""
        ...

    def downscale(self, config: Config) -> int:
        """Pixels per latent along one side."""
        ...

    def latent_frames(self, config: Config, frames: int) -> int:
        """Return F of the latents of so many frames."""
        ...

    def usable_frames(self, config: Config, frames: int) -> int:
        """Return the largest number of frames, at most ``frames``, that the model takes; 0 where there is
        none.
        """
        ...

    def fitted(self, network_config: Config) -> "Codec":
        """Return the codec of a model whose network has this configuration.

        Not every network takes every number of latent frames.
        """
        ...

    def frames_of(self, config: Config, latent_frame: int) -> range:
        """Return the frames of a latent frame, for labels in seconds."""
        ...

    def encode(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posterior in the network's scale, float32, of pixels in [-1, 1]."""
        ...

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], float32, of latents in the network's scale."""
        ...


def affine(config: Config, axes: int) -> tuple[Tensor, Tensor]:
    """(shift, scale) of an autoencoder's configuration, broadcastable against latents of so many axes."""
    scale = torch.tensor(float(config.get("scaling_factor") or 1.0))
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shape = (1, -1) + (1,) * (axes - 2)
        mean, std = torch.tensor(config["latents_mean"]), torch.tensor(config["latents_std"])
        return mean.view(shape), scale / std.view(shape)
    return torch.tensor(float(config.get("shift_factor") or 0.0)), scale


def encoded(vae: Any, pixels: Tensor, moments: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, std) of ``vae``'s posterior in the network's scale, which is (shift, scale) from its own."""
    shift, scale = moments
    with vae_precision(vae) as exact:
        posterior = exact.encode(pixels.to(exact.device, exact.dtype)).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
    return (mean - shift.to(mean)) * scale.to(mean), std * scale.to(std)


def decoded(vae: Any, latents: Tensor, moments: tuple[Tensor, Tensor], times: Tensor | None = None) -> Tensor:
    """Pixels in [0, 1] of latents in the network's scale; ``times`` (B,) of a decoder that takes them."""
    shift, scale = moments
    with vae_precision(vae) as exact:
        latents = latents.to(exact.device, torch.float32)
        plain = (latents / scale.to(latents) + shift.to(latents)).to(exact.dtype)
        arguments = () if times is None else (times.to(plain),)
        pixels: Tensor = exact.decode(plain, *arguments, return_dict=False)[0].float()
    return (pixels / 2 + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class Images:
    """``AutoencoderKL``: an image is an image.

    Attributes:
        shifted: whether pipelines of the family read ``shift_factor``; that of another's VAE is left out, as
            they leave it out.
    """

    shifted: bool = True
    video: bool = False
    exact: bool = False

    def channels(self, config: Config) -> int:
        """``latent_channels``."""
        return int(config["latent_channels"])

    def downscale(self, config: Config) -> int:
        """2 per level below the first."""
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def latent_frames(self, config: Config, frames: int) -> int:
        """One."""
        return 1

    def usable_frames(self, config: Config, frames: int) -> int:
        """One."""
        return 1

    def fitted(self, network_config: Config) -> "Images":
        """Itself."""
        return self

    def frames_of(self, config: Config, latent_frame: int) -> range:
        """Return the only codec."""
        return range(1)

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """(mean, std) of the posterior in the network's scale."""
        return encoded(vae, pixels, self._moments(vae.config))

    def decode(self, vae: Any, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [0, 1]."""
        return decoded(vae, latents, self._moments(vae.config))

    def _moments(self, config: Config) -> tuple[Tensor, Tensor]:
        return affine(config if self.shifted else {**config, "shift_factor": None}, 4)


_FRAME = Images(shifted=False)


@dataclass(frozen=True)
class FrameByFrame:
    """``AutoencoderKL`` of a video network without an autoencoder of videos: every frame is an image.

    Attributes:
        at_once: frames in one call of the autoencoder, which needs more memory than the network.
        longest: maximal number of frames of a network, by its configuration; None: any.
        most: the same for the network that the codec is fitted to.
    """

    at_once: int = 8
    longest: Callable[[Config], int] | None = None
    most: int | None = None
    video: bool = True
    exact: bool = False

    def channels(self, config: Config) -> int:
        """``latent_channels``."""
        return _FRAME.channels(config)

    def downscale(self, config: Config) -> int:
        """2 per level below the first."""
        return _FRAME.downscale(config)

    def latent_frames(self, config: Config, frames: int) -> int:
        """As many."""
        return frames

    def usable_frames(self, config: Config, frames: int) -> int:
        """Any number up to ``most``."""
        return frames if self.most is None else min(frames, self.most)

    def fitted(self, network_config: Config) -> "FrameByFrame":
        """Return the codec with the network's maximal number of frames."""
        return self if self.longest is None else replace(self, most=self.longest(network_config))

    def frames_of(self, config: Config, latent_frame: int) -> range:
        """Return the frame itself."""
        return range(latent_frame, latent_frame + 1)

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 F H W"]
    ) -> tuple[Float[Tensor, "B C F h w"], Float[Tensor, "B C F h w"]]:
        """(mean, std) of the posterior in the network's scale."""
        count = pixels.shape[2]
        parts = [_FRAME.encode(vae, part) for part in _unrolled(pixels).split(self.at_once)]
        mean, std = (_rolled(torch.cat(moments), count) for moments in zip(*parts, strict=True))
        return mean, std

    def decode(self, vae: Any, latents: Float[Tensor, "B C F h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Pixels in [0, 1]."""
        parts = [_FRAME.decode(vae, part) for part in _unrolled(latents).split(self.at_once)]
        return _rolled(torch.cat(parts), latents.shape[2])


def _unrolled(videos: Float[Tensor, "B C F H W"]) -> Float[Tensor, "N C H W"]:
    return videos.transpose(1, 2).flatten(0, 1)


def _rolled(frames: Float[Tensor, "N C H W"], count: int) -> Float[Tensor, "B C F H W"]:
    return frames.unflatten(0, (-1, count)).transpose(1, 2)


def _configured(vae: Any) -> tuple[Tensor, Tensor]:
    return affine(vae.config, 5)


def _single(network_config: Config) -> int:
    return 1


def _untold(vae: Any, count: int) -> None:
    return None


@dataclass(frozen=True)
class Videos:
    """A causal autoencoder of videos: its first latent frame is the first frame, each further one ``stride``
    frames.

    Where the network's patches span several latent frames, copies of the first one precede it to fill a
    patch: CogVideoX 1.5 was trained so, and its pipeline drops these frames of its output.

    Attributes:
        width: channels of the latents by the configuration, whose names differ from class to class.
        space: pixels per latent along one side.
        stride: frames per latent frame after the first.
        moments: of an autoencoder, (shift, scale) from its own scale to the network's.
        times: (number of videos) -> times (B,) for the decoder; None: it takes no time.
        step: difference between valid numbers of frames; None: the stride.
        depth: latent frames of one patch, by the network's configuration.
        copies: number of copies of the first latent frame, by the network that the codec is fitted to.
        exact: whether the autoencoder is kept in float32.
    """

    width: Callable[[Config], int]
    space: Callable[[Config], int]
    stride: Callable[[Config], int]
    moments: Callable[[Any], tuple[Tensor, Tensor]] = _configured
    times: Callable[[Any, int], Tensor | None] = _untold
    step: Callable[[Config], int] | None = None
    depth: Callable[[Config], int] = _single
    copies: int = 0
    exact: bool = False
    video: bool = True

    def channels(self, config: Config) -> int:
        """C of the latents."""
        return self.width(config)

    def downscale(self, config: Config) -> int:
        """Pixels per latent along one side."""
        return self.space(config)

    def latent_frames(self, config: Config, frames: int) -> int:
        """1 + (frames - 1) / stride, and the copies."""
        return self.copies + 1 + (frames - 1) // self.stride(config)

    def usable_frames(self, config: Config, frames: int) -> int:
        """1 more than a multiple of the step."""
        step = (self.step or self.stride)(config)
        return 1 + (frames - 1) // step * step if frames > 0 else 0

    def fitted(self, network_config: Config) -> "Videos":
        """Return the codec with the copies that fill the network's patches."""
        return replace(self, copies=self.depth(network_config) - 1)

    def frames_of(self, config: Config, latent_frame: int) -> range:
        """0 of the first one and its copies; of the k-th after it, (k - 1) stride + 1 up to k stride."""
        k, stride = max(0, latent_frame - self.copies), self.stride(config)
        return range((k - 1) * stride + 1, k * stride + 1) if k else range(1)

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 F H W"]
    ) -> tuple[Float[Tensor, "B C f h w"], Float[Tensor, "B C f h w"]]:
        """(mean, std) of the posterior in the network's scale.

        The network is trained with copies of one draw, but posterior noise is drawn for each latent: so where
        there are copies, they and the first frame are the mean, with std 0.
        """
        mean, std = encoded(vae, pixels, self.moments(vae))
        if not self.copies:
            return mean, std
        first, sure = [mean[:, :, :1]] * self.copies, torch.zeros_like(std[:, :, :1])
        return torch.cat([*first, mean], 2), torch.cat([sure] * (self.copies + 1) + [std[:, :, 1:]], 2)

    def decode(self, vae: Any, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Pixels in [0, 1]."""
        latents, moments, times = latents[:, :, self.copies :], self.moments(vae), self.times(vae, 1)
        if times is None:
            return decoded(vae, latents, moments)
        # one by one: diffusers' slices of a batch lose the times
        return torch.cat([decoded(vae, one, moments, times) for one in latents.split(1)])
