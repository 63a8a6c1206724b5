"""The autoencoder of FLUX.2, whose latents are normalised patches of 2 x 2."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.models.codecs import Images, decoded, encoded

SIDE = 2  # of a patch
PLAIN = (torch.tensor(0.0), torch.tensor(1.0))  # (shift, scale) of the autoencoder's own latents


@dataclass(frozen=True)
class NormalisedPatches(Images):
    """``AutoencoderKLFlux2``: 2 x 2 latents are the channels of one, (B, 4 C, h / 2, w / 2), normalised by
    the running statistics that its checkpoint holds (``bn``). They count as its latents everywhere.
    """

    def channels(self, config: Mapping[str, Any]) -> int:
        """4 times ``latent_channels``."""
        return SIDE**2 * int(config["latent_channels"])

    def downscale(self, config: Mapping[str, Any]) -> int:
        """2 per level below the first, and 2 of the patch."""
        return SIDE * super().downscale(config)

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """(mean, std) of the posterior in the network's scale."""
        mean, std = (patches(moment) for moment in encoded(vae, pixels, PLAIN))
        shift, scale = _statistics(vae)
        return (mean - shift.to(mean)) / scale.to(mean), std / scale.to(std)

    def decode(self, vae: Any, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [0, 1]."""
        shift, scale = (value.to(latents.device) for value in _statistics(vae))
        return decoded(vae, whole(latents.float() * scale + shift), PLAIN)


def patches(latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D p q"]:
    """Return 2 x 2 latents as channels, (B, 4 C, h / 2, w / 2): channel, row, column."""
    split = latents.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # B C h/2 2 w/2 2
    return split.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def whole(packed: Float[Tensor, "B D p q"]) -> Float[Tensor, "B C h w"]:
    """Undo ``patches``."""
    split = packed.unflatten(1, (-1, SIDE, SIDE))  # B C 2 2 h/2 w/2
    return split.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """(mean, standard deviation) of the packed latents, (1, 4 C, 1, 1), float32."""
    mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
    return mean.view(1, -1, 1, 1), (variance + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
