"""An autoencoder of videos for images: Qwen-Image's, whose latents have one frame."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffalign.models.codecs import Images, affine, decoded, encoded


@dataclass(frozen=True)
class Stills(Images):
    """``AutoencoderKLQwenImage``: an image is a video of one frame, its latents are those of that frame."""

    def channels(self, config: Mapping[str, Any]) -> int:
        """``z_dim``."""
        return int(config.get("z_dim", 16))

    def downscale(self, config: Mapping[str, Any]) -> int:
        """2 per level below the first."""
        return int(2 ** len(config.get("temperal_downsample", (False, True, True))))

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """(mean, std) of the posterior in the network's scale."""
        mean, std = encoded(vae, pixels.unsqueeze(2), affine(vae.config, 5))
        return mean.squeeze(2), std.squeeze(2)

    def decode(self, vae: Any, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [0, 1]."""
        return decoded(vae, latents.unsqueeze(2), affine(vae.config, 5)).squeeze(2)
