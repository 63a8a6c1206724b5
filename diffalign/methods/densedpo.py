"""DenseDPO. Wu et al. 2025, "DenseDPO: Fine-Grained Temporal Preference Optimization for Video Diffusion
Models", arXiv 2506.03517.

Diffusion-DPO with a label for each part of a video. With m the policy's and r the reference's mean squared
error over channels, height and width of latent frame f, and l_f in {-1, 0, 1} the label of the frame,

    inside_f = -(beta / 2) l_f [(m_0f - r_0f) - (m_1f - r_1f)],    loss = mean_f -log sigmoid(inside_f),

where the mean is over all frames of the batch with l_f != 0 (``average: frames``), as in the paper's
pseudo-code (appendix E). The paper states two more forms: a mean within each pair first ("averaged over all
non-tie tokens within a training video pair", ``videos``), and equation 7, one sigmoid around the sum over a
pair's frames (``sum``; ``mean`` divides by the number of labelled frames, so that beta is Diffusion-DPO's).

No code was released. One noise and one time are shared by the pair, as in the pseudo-code, and t is
logit-normal. Tied frames have weight 0, and so have pairs with tied frames only (equation 7 gives them log 2
without gradient). A batch's scores are (B, F), one column per latent frame: ``diffalign.data`` computes them
from labels in seconds.

The paper's baselines are settings of ``dpo``. VanillaDPO is ``dpo`` on two videos drawn independently
(``diffalign video-pairs --eta 1``) with one label per pair; StructuralDPO is ``dpo`` on guided pairs
(``diffalign video-pairs``) with one label per pair. ``data.view: majority`` makes one label of dense ones.
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
    """Diffusion-DPO on pairs of videos, frame by frame.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards of a frame are beta (r - m) / 2.
        average: mean of the losses over all labelled frames of the batch ("frames"), or over those of each
            pair first ("videos"); or one loss of the "sum" or "mean" of the logits of a pair's frames.
        loss: pairwise loss of a frame (or of a pair).
        over_time: weight of beta at time t: "constant", or "alpha_squared" for beta alpha(t)^2.
        time: distribution of the training times, one draw per pair.
        reduce: reduction of squared errors (B, *d) to units of a sample.
    """

    beta: float = 500.0
    average: Literal["frames", "videos", "sum", "mean"] = "frames"
    over_time: OverTime = "constant"
    time: TimeSampler = choice(TIMES, LogitNormal())
    reduce: Reduce = PerFrame()

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over frames (or pairs) that are not tied.

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
    """Raise UserError unless the batch holds videos with a score for each latent frame."""
    x, score = tuple(batch.x.shape), tuple(batch.score.shape)
    if len(x) != 5:
        raise UserError(
            f"densedpo: latents of shape {x} are images; allowed: videos, (B, C, F, h, w) (images: dpo)"
        )
    if score != (x[0], x[2]):
        raise UserError(
            f"densedpo: scores of shape {score} for {x[2]} latent frames; allowed: dense labels, "
            f"{(x[0], x[2])} (`diffalign label-segments` makes them; with one label per pair use dpo)"
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
