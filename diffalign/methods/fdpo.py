"""f-DPO. Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
Divergence Constraints", arXiv 2309.16240, equation 9, on diffusion likelihoods.

The implicit reward of a policy regularised by an f-divergence is beta f'(u) with u = p_policy / p_reference:

    loss = l(beta (f'(u_w) - f'(u_l))),    log u = -(scale / 2) (m - r),    l(h) = -log sigmoid(h).

``scale`` converts a difference of mean errors to log-likelihood, the unit of the non-linear f'; ``beta`` is
that of the paper. With the reverse KL (f' = log u) only their product matters, and the method is
Diffusion-DPO with beta = scale * beta. f' of the forward KL and of alpha is steep where u is small, which
penalises a fall of the winner's likelihood; f' of Jensen-Shannon is flat where u is large.

Ours: the transfer to denoising errors and the value of ``scale``. Ties have weight 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.losses.divergences import DIVERGENCES, Divergence, JensenShannon
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.methods._base import StateMethod, check_positive
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class FDPO(StateMethod):
    """DPO with an f-divergence.

    Attributes:
        scale: factor from errors to log-ratios, above 0: log u = -(scale / 2) (m - r).
        beta: weight of the divergence, above 0; rewards are beta f'(u).
        divergence: the f-divergence to the reference, through its derivative f'.
        loss: pairwise loss of the rewards of two rivals.
    """

    scale: float = 5000.0
    beta: float = 1.0
    divergence: Divergence = choice(DIVERGENCES, JensenShannon())
    loss: PairwiseLoss = choice(LOSSES, Logistic())

    def __post_init__(self) -> None:
        check_positive(self, "scale", "beta")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied; ``rewards/*`` are beta f'(u)."""
        c = compare(self, policy, reference, batch, generator)
        chosen, rejected = (self.beta * self.divergence(self.scale * x) for x in (c.chosen, c.rejected))
        losses = pair_losses(self.loss, chosen, rejected, c, batch)
        step = preference_step(c, losses, self.beta * self.scale)
        means = [c.mean(reward.detach()) for reward in (chosen, rejected, chosen - rejected)]
        names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
        return Step(step.loss, {**step.metrics, **dict(zip(names, means, strict=True))}, step.weight)


CARD = MethodCard(
    name="fdpo",
    title="f-DPO",
    paper="Wang et al., Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints",
    year=2023,
    arxiv="2309.16240",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=FDPO,
    soft=True,
)
