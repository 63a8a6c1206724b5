"""Wan 2.2 TI2V-5B as image to video (Wan team 2025, arXiv 2503.20314): the network and weights of its text to
video, whose first latent frame is the source's (``diffusion/first_frame.py``).

Every token has its own time (``expand_timesteps``), 0 in the first frame. The weights are stored as text to
video's, so ``model.family`` says which of both is meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from diffalign.diffusion import first_frame
from diffalign.errors import UserError
from diffalign.models.families.base import bare
from diffalign.models.families.sources import GivenFrame, SourceImages
from diffalign.models.families.wan import CONFIGS as WAN_CONFIGS
from diffalign.models.families.wan import TI2V, WanVideo
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {**WAN_CONFIGS, **TI2V}


@dataclass(frozen=True)
class WanFirstFrame(WanVideo):
    """The family ``wan_ti2v``.

    Attributes:
        max_sequence_length: tokens of UMT5.
        network_name: the transformer that is trained.
    """

    name: str = "wan_ti2v"

    sources: ClassVar[SourceImages | None] = GivenFrame()

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Wan2.2-TI2V-5B's components."""
        return CONFIGS

    def settle(self, pipeline: Any) -> None:
        """Refuse another Wan.

        Raises:
            UserError: its tokens have no times of their own.
        """
        if not pipeline.config.get("expand_timesteps"):
            raise UserError(
                "model.family='wan_ti2v' with a pipeline of Wan without expand_timesteps, whose tokens have "
                "no times of their own; allowed: Wan2.2-TI2V-5B"
            )

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w), of no meaning in the first frame."""
        patch, (frames, height, width) = self.patch(bare(network).config), x_t.shape[2:]
        times = first_frame.token_times(model_time, frames, (height // patch) * (width // patch))
        return super().call(network, first_frame.with_source(x_t, cond), times, cond)


WAN_TI2V = WanFirstFrame()
