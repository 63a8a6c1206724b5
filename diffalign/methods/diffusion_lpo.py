"""Diffusion-LPO. Bai et al. 2025, "Towards Better Optimization For Listwise Preference in Diffusion Models",
arXiv 2510.01540: Diffusion-DPO for ranked lists by the likelihood of the whole order (no public code).

For a list ordered by its scores, best first, at one time and with one noise, with m the policy's and r the
reference's mean squared error,

    s_k = -(beta / 2) (m_k - r_k),    l_k = log sum_{j >= k} exp(s_j) - s_k,
    loss = sum over k of [ l_k + alpha (1 - exp(-l_k)) ],

and with ``smoothing`` e, l_k = log sum_{j >= k} exp(s_j) - (1 - e) s_k - e mean_{j >= k} s_j.

This is the Plackett-Luce model, which draws the best of the remaining members position by position. A list of
two with alpha 0 gives Diffusion-DPO, with another alpha Poly-DPO. ``top`` restricts the sum to the first
positions, and ``positions: mean`` divides by their number.

The later versions of ADPO's released code (wk222/verlm) have this loss for language models: ``top: 3``,
``positions: mean``, ``alpha: 1``, ``smoothing: 0.1``.

Ours: rivals with equal scores are left out of each other's sums, since their order is unknown; a list of
equal scores has weight 0. The paper builds its lists from the pairs of a prompt; its beta is not known to us.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import expand
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast, pairs_of
from diffalign.losses.listwise import plackett_luce, positions
from diffalign.methods._base import ScaledMethod
from diffalign.methods._common import noisy, preference_metrics
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True, kw_only=True)
class DiffusionLPO(ScaledMethod):
    """Negative log-likelihood of the order of ranked lists.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        top: number of positions in the loss, from the best, at least 1; null: all.
        positions: whether a list's loss is the "sum" or the "mean" over its positions.
        alpha: weight of the polynomial term of each position, at least -1.
        smoothing: share of a position's label that is spread over the remaining members, in [0, 1).
    """

    beta: float = 5000.0
    top: int | None = None
    positions: Literal["sum", "mean"] = "sum"
    alpha: float = 0.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top is not None and self.top < 1:
            raise UserError(f"method.top={self.top}; allowed: 1 or more, or null for all positions")
        if not self.alpha >= -1:
            raise UserError(f"method.alpha={self.alpha}; allowed: -1 or more")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"method.smoothing={self.smoothing}; allowed: 0 or more and less than 1")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over the lists that are not tied."""
        z = noisy(self, policy, reference, batch, generator)
        ratio = elbo(policy, reference, z, batch.cond, self.reduce).log_ratio
        score = batch.score.to(ratio)
        terms = plackett_luce(self.beta * ratio, score, batch.group, self.smoothing)
        if self.alpha:
            terms = terms + self.alpha * -torch.expm1(-terms)
        number = sent(batch.group.bincount() - 1, terms)  # the last position of a list has no term
        if self.top is not None:
            terms = torch.where(positions(score, batch.group) <= self.top, terms, 0.0)
            number = number.clamp(max=self.top)
        c = contrast(ratio, batch.score, batch.group)
        losses = _by_list(terms, batch.group, batch.num_groups)
        if self.positions == "mean":
            losses = losses / expand(number.clamp(min=1), losses)
        pairs = batch.group[pairs_of(batch.group)[0]]
        lists = _by_list(c.weight, pairs, batch.num_groups).sign()
        loss = (losses * lists).sum() / lists.sum().clamp(min=1)
        return Step(loss, {"loss": loss.detach(), **preference_metrics(c, self.beta)}, lists.sum())


def _by_list(values: Tensor, group: Tensor, count: int) -> Tensor:
    """Return values (N, *unit) summed over each of the ``count`` lists, (G, *unit)."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, sent(group, values.device), values)


CARD = MethodCard(
    name="diffusion_lpo",
    title="Diffusion-LPO",
    paper="Bai et al., Towards Better Optimization For Listwise Preference in Diffusion Models",
    year=2025,
    arxiv="2510.01540",
    data=DataKind.LISTS,
    cost="K policy samples with gradient, K reference samples, for lists of K",
    method=DiffusionLPO,
)
