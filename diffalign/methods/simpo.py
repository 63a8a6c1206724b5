"""SimPO for diffusion. Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free
Reward", arXiv 2405.14734, equation 6.

    loss = l( (beta / 2) (m_l - m_w) - gamma ),    l(h) = -log sigmoid(h),

with m the policy's mean squared denoising errors. There is no reference, which saves its memory and its
forward passes, and ``gamma`` is the target margin. ``gamma`` is in units of the logit, so the paper's gamma /
beta of .5 at beta 2 is gamma 1. A mean over latent elements is the paper's length normalisation.

Ours: the transfer to denoising errors. Without a reference, the part of a gap that is due to the images (a
plain loser is easier to denoise than a detailed winner) is not removed, so ``gamma`` must be large compared
with the spread of scaled gaps; otherwise pairs whose gap exceeds it have little gradient. Only early stopping
limits the distance to the initial model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import denoising_error
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast, contrast
from diffalign.methods._base import PairMethod
from diffalign.methods._common import noisy
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class SimPO(PairMethod):
    """SimPO on pairs, without a reference.

    Attributes:
        beta: scale of the logit, above 0: rewards are -beta m / 2.
        gamma: target margin in units of the logit, at least 0.
    """

    beta: float = 2000.0
    gamma: float = 1.0

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma < 0:
            raise UserError(f"method.gamma={self.gamma}; allowed: 0 or more")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied; ``reference`` is not called."""
        z = noisy(self, policy, reference, batch, generator)
        likelihood = -0.5 * denoising_error(policy, z, batch.cond, self.reduce)
        c = contrast(likelihood, batch.score, batch.group)
        loss = c.mean(self.loss(self.beta * c.chosen - self.gamma, self.beta * c.rejected))
        return Step(loss, {"loss": loss.detach(), **_metrics(c)}, c.count)


def _metrics(c: Contrast) -> dict[str, Tensor]:
    """Return metrics of denoising errors; ``rewards/*`` and ``errors/*`` would be relative to a reference."""
    chosen, rejected, margin = (x.detach() for x in (c.chosen, c.rejected, c.margin))
    return {
        "denoising/chosen": -2 * c.mean(chosen),
        "denoising/rejected": -2 * c.mean(rejected),
        "denoising/accuracies": c.mean((margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)),
    }


CARD = MethodCard(
    name="simpo",
    title="SimPO",
    paper="Meng et al., SimPO: Simple Preference Optimization with a Reference-Free Reward",
    year=2024,
    arxiv="2405.14734",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient",
    method=SimPO,
)
