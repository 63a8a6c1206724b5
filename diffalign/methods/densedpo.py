"""DenseDPO. Wu et al. 2025, "DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion
Models", arXiv 2506.03517.

Diffusion-DPO with a label for each part of a video. With m the policy's and r the reference's mean squared
error over channels, height and width of latent frame f, l_f in {-1, 0, 1} who is better there,

    inside_f = -(beta / 2) l_f [(m_0f - r_0f) - (m_1f - r_1f)],    loss = mean_f -log sigmoid(inside_f),

the mean being over all frames of the batch with l_f != 0 (``average: frames``): the paper's pseudo-code
(appendix E), which was run. The paper states two more: a mean within each pair first ("averaged over all
non-tie tokens within a training video pair", ``videos``), and equation 7, one sigmoid around the sum over a
pair's frames (``sum``; ``mean`` divides by how many are decided, and beta is Diffusion-DPO's again).

No code was released. One noise and one time are shared by the pair, as in the pseudo-code, and t is
logit-normal. A frame that is a tie weighs nothing; a pair of nothing but ties, to which equation 7 gives log
2 and no gradient, weighs nothing either. A batch's scores are (B, F), a column a latent frame:
``diffalign.data`` makes them of labels in seconds.

The paper's baselines are settings. VanillaDPO is ``dpo`` on two videos drawn independently
(``diffalign video-pairs --eta 1``) with one label a pair; StructuralDPO is ``dpo`` on guided pairs
(``diffalign video-pairs``) with one label a pair. ``data.view: majority`` makes one label of dense ones.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import PerFrame
from diffalign.diffusion.times import LogitNormal
from diffalign.errors import UserError
from diffalign.losses.contrast import per_pair
from diffalign.methods._base import TIMES, PairMethod
from diffalign.methods._common import OverTime, compare, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Reduce, Step, TimeSampler


@dataclass(frozen=True, kw_only=True)
class DenseDPO(PairMethod):
    """Pairs of videos, compared frame by frame.

    Attributes:
        beta: weight of the KL to the reference, in units of a frame's mean squared error with the 1/2.
        average: over what: all decided frames of the batch, or those of each pair first ("videos"); or the
            logits of a pair's frames become one, their "sum" or "mean".
        loss: what a frame (or a pair) demands of its logit.
        over_time: beta at time t: the same everywhere, or beta alpha(t)^2.
        time: which times are trained on, one per pair.
        reduce: what counts as one unit of a sample.
    """

    beta: float = 500.0
    average: Literal["frames", "videos", "sum", "mean"] = "frames"
    over_time: OverTime = "constant"
    time: TimeSampler = choice(TIMES, LogitNormal())
    reduce: Reduce = PerFrame()

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over what is no tie.

        Raises:
            UserError: the batch holds images, or has no label for each latent frame.
        """
        check_dense(batch)
        c = compare(self, policy, reference, batch, generator, self.over_time)
        if self.average in ("sum", "mean"):
            c = per_pair(c, self.average)
        losses = self.loss(self.beta * c.chosen, self.beta * c.rejected)
        if self.average == "videos":
            losses, c = c.mean_per_pair(losses), per_pair(c, "mean")
        return preference_step(c, losses, self.beta)


def check_dense(batch: Batch[Tensor]) -> None:
    """UserError unless the batch holds videos with a score for each latent frame."""
    x, score = tuple(batch.x.shape), tuple(batch.score.shape)
    if len(x) != 5:
        raise UserError(
            f"densedpo: latents of shape {x} are images; allowed: videos, (B, C, F, h, w) (images: dpo)"
        )
    if score != (x[0], x[2]):
        raise UserError(
            f"densedpo: scores of shape {score} for {x[2]} latent frames; allowed: dense labels, "
            f"{(x[0], x[2])} (`diffalign label-segments` makes them; with one label a pair use dpo)"
        )


CARD = MethodCard(
    name="densedpo",
    title="DenseDPO",
    paper="Wu et al., DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion Models",
    year=2025,
    arxiv="2506.03517",
    data=DataKind.DENSE_PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=DenseDPO,
)
