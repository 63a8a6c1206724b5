"""f-DPO. Wang et al. 2023, "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse
Divergence Constraints", arXiv 2309.16240, equation 9, on diffusion likelihoods.

A policy regularised by an f-divergence stands for the reward beta f'(u), u = p_policy / p_reference:

    loss = l(beta (f'(u_w) - f'(u_l))),    log u = -(scale / 2) (m - r),    l(h) = -log sigmoid(h).

``scale`` turns a difference of mean errors into log-likelihood, where the non-linear f' means what the paper
says; ``beta`` is the paper's own. With the reverse KL (f' = log u) only their product counts and the method
is Diffusion-DPO of beta = scale * beta. Forward KL and alpha are steep where u is small, so a loser need fall
only a little and a falling winner costs much; Jensen-Shannon is flat where u is large.

Ours: the transposition to denoising errors, hence the value of ``scale``. Ties have weight 0.
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
    """Pairs under an f-divergence.

    Attributes:
        scale: makes log-ratios: log u = scale times minus half the difference of mean squared errors.
        beta: the paper's weight of the divergence; rewards are beta f'(u).
        divergence: what keeps the policy near the reference.
        loss: what a pair demands of its rewards.
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
        """Return the mean loss over all pairs of rivals that are no tie; ``rewards/*`` are beta f'(u)."""
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
