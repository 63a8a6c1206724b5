"""AOT. Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport", arXiv
2406.05882, on diffusion likelihoods.

The objective is that the distribution of winners dominates that of losers (first-order stochastic dominance):
quantiles are compared instead of the members of each pair. In one dimension the optimal transport between two
samples pairs them in order, so both are sorted over the pairs of a batch before they are compared:

    paired:    u = log p(x_w) - log p(x_l) of the policy against the same of the reference,
    unpaired:  u = log-ratio of the winners against log-ratio of the losers,
    loss = mean_i l(beta (u_(i) - v_(i))),    l(h) = -log sigmoid(h), optionally with smoothed labels.

The distributions are those of the micro-batch, so, unlike for other methods here, the loss depends on how a
batch is split: use micro-batches of many pairs. A micro-batch of one pair gives DPO. Pairs at different times
share one distribution. TRL's names are ``aot`` and ``aot_unpaired``.

Ours: the transfer to denoising errors; ties are removed before the sort.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.losses.contrast import contrast
from diffalign.methods._base import PairMethod
from diffalign.methods._common import noisy, preference_metrics
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class AOT(PairMethod):
    """Pairwise loss of sorted margins.

    Attributes:
        beta: scale of the logit, above 0: rewards are beta (r - m) / 2.
        paired: sort the margins of pairs under policy and reference; otherwise winners and losers separately.
        loss: pairwise loss of two quantiles; ``{"type": "logistic", "label_smoothing": 0.1}`` smooths labels.
        reduce: reduction of squared errors to units; units are pooled.
    """

    beta: float = 5000.0
    paired: bool = True

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all quantiles of the pairs that are not tied."""
        z = noisy(self, policy, reference, batch, generator)
        ll = elbo(policy, reference, z, batch.cond, self.reduce)
        pairs = lambda x: contrast(x, batch.score, batch.group)  # noqa: E731
        c = pairs(ll.log_ratio)
        # u and v: winners' and losers' log-ratios, or (paired) margins under policy and reference
        above, below = c.chosen, c.rejected
        if self.paired:
            above, below = pairs(ll.policy).margin, pairs(ll.reference).margin
        losses = self.loss(self.beta * ascending(above, c.weight), self.beta * ascending(below, c.weight))
        loss = (losses * ascending(c.weight, c.weight)).sum() / c.count.clamp(min=1)
        return Step(loss, {"loss": loss.detach(), **preference_metrics(c, self.beta)}, c.count)


def ascending(values: Tensor, weight: Tensor) -> Tensor:
    """Return ``values`` (P, *unit) in ascending order, (P * units,), with those of weight 0 last."""
    order = values.detach().masked_fill(weight == 0, torch.inf).flatten().argsort(stable=True)
    return values.flatten()[order]


CARD = MethodCard(
    name="aot",
    title="AOT",
    paper="Melnyk et al., Distributional Preference Alignment of LLMs via Optimal Transport",
    year=2024,
    arxiv="2406.05882",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=AOT,
)
