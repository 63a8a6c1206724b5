"""LTX-Video 0.9 as image to video (HaCohen et al. 2024, arXiv 2501.00103): the same network and weights as of
text to video, whose first latent frame is the source's.

Every token has its own time: 0 in the first frame, which the network sees clean, and the video's in the
others. The stock pipeline predicts and steps the others alone (``diffusion/first_frame.py``). It draws the
source's latents from the autoencoder's posterior; here they are its mean, as a cache holds them. The weights
are stored as text to video's, so ``model.family`` says which of both is meant.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from diffalign.diffusion import first_frame
from diffalign.models.families.ltx import LTXVideo
from diffalign.models.families.sources import GivenFrame, SourceImages
from diffalign.types import Cond


@dataclass(frozen=True)
class LTXImageToVideo(LTXVideo):
    """The family ``ltx_i2v``.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    name: str = "ltx_i2v"

    sources: ClassVar[SourceImages | None] = GivenFrame(batched=True)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w), of no meaning in the first frame."""
        frames, height, width = x_t.shape[2:]
        times = first_frame.token_times(model_time, frames, height * width)
        return super().call(network, first_frame.with_source(x_t, cond), times, cond)


LTX_I2V = LTXImageToVideo()
