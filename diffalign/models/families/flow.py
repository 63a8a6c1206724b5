"""What families of rectified flow share: evenly spaced times that the scheduler shifts, packed latents."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from diffalign.models.families.base import Usual, flow_grid

SIDE = 2  # of a patch that the pipeline packs


class SpacedEvenly(Usual):
    """A family whose pipeline hands the scheduler sigmas evenly spaced from 1 to 1 / steps."""

    def shifting_tokens(self, network_config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Return the number of tokens that a dynamic shift depends on: those of latents of this shape."""
        patch = self.patch(network_config)
        return math.prod(shape[1:-2]) * (shape[-2] // patch) * (shape[-1] // patch)

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Evenly spaced from 1 to 1 / steps, then shifted by the scheduler."""
        return flow_grid(scheduler, steps, self.shifting_tokens(network_config, shape), own_sigmas=True)


class Packed(SpacedEvenly):
    """A family whose network sees 2 x 2 latents in a row, packed outside of it (see ``flux.pack``)."""

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """Return a quarter of ``in_channels``, which count those of 2 x 2 latents."""
        return int(network_config["in_channels"]) // SIDE**2

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """2."""
        return SIDE


def masked(states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return text states (B, tokens, ...) and their mask (B, tokens) as conditions, float32."""
    return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask.float()}


def masked_shapes(tokens: int, *widths: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one sample's ``masked`` conditions."""
    return {"encoder_hidden_states": (tokens, *widths), "encoder_attention_mask": (tokens,)}
