"""APO. D'Oosterlinck et al. 2024, "Anchored Preference Optimization and Contrastive Revisions", arXiv
2408.06266, equations 7 and 8, on Diffusion-DPO's rewards.

With c and r = -(beta / 2) (m - m_reference) of the chosen and the rejected sample and sig the logistic
function,

    zero:  1 - sig(c) + sig(r)        winners better than the model's samples: raises c, lowers r
    down:  sig(c) + 1 - sig(c - r)    winners worse than them: lowers both, r more than c.

DPO determines the difference c - r only; these losses also determine the sign of each change. They are
bounded, so the gradient of a pair with a large reward of either sign vanishes.

Ours: the transfer to denoising errors. Both losses are also ``loss`` settings of ``dpo``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.losses.pairwise import APODown, APOZero
from diffalign.methods._base import ScaledMethod
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class APO(ScaledMethod):
    """APO on pairs of rivals.

    Attributes:
        beta: scale of the rewards, above 0: rewards are beta (r - m) / 2.
        variant: "zero" for winners that are better than the model's own images, "down" for worse ones.
    """

    beta: float = 2000.0
    variant: Literal["zero", "down"] = "zero"

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied."""
        c = compare(self, policy, reference, batch, generator)
        loss = APOZero() if self.variant == "zero" else APODown()
        losses = pair_losses(loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="apo",
    title="APO",
    paper="D'Oosterlinck et al., Anchored Preference Optimization and Contrastive Revisions",
    year=2024,
    arxiv="2408.06266",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=APO,
    soft=True,
)
