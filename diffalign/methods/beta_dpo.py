"""beta-DPO. Wu et al. 2024, "beta-DPO: Direct Preference Optimization with Dynamic beta", arXiv 2407.08639;
the authors' code (junkangwu/beta-DPO), on Diffusion-DPO's likelihood.

With the gap of a pair g = -(scale / 2) [(m_w - r_w) - (m_l - r_l)], and M and S running means of the mean and
the standard deviation of the gaps,

    selected    a share 1 - filter of the pairs, drawn without replacement by exp(-((g - M) / S)^2 / 2),
    beta_used = max( low, beta (1 + sensitivity (mean of the selected gaps - M)) ),    without gradient,
    loss      = mean over the selected of -log sigmoid(beta_used g).

A batch with large gaps has a larger beta, and pairs with unusual gaps are left out. ``scale`` converts errors
to log-ratios of about 1, the unit of ``sensitivity``; scale times beta is the beta of ``dpo``.

M and S are computed over all processes; each process selects among the pairs of its micro-batch, by random
numbers of their groups, so a selection needs micro-batches of several pairs. Without gradients (evaluation)
no pair is left out, and M and S are not updated. Differences from the released code: M and S start with those
of the first batch (there with 0, which selects outliers for many steps); S is the deviation of all gaps
(there the mean of unbiased deviations); at least one pair is selected.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.randomness import uniform
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast, pairs_of
from diffalign.methods._base import PairMethod, check_positive
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.distributed import mean_over_ranks
from diffalign.utils.transfer import sent


class Gaps:
    """Running mean and standard deviation of the gaps, float64 scalars; NaN before the first update."""

    def __init__(self) -> None:
        self.mean = torch.full((), torch.nan, dtype=torch.float64)
        self.std = torch.full((), torch.nan, dtype=torch.float64)

    def update(self, gap: Tensor, weight: Tensor, decay: float) -> None:
        """Update with the gaps (P,) of all processes; equal gaps (all 0 at initialisation) are skipped."""
        mean = mean_over_ranks(gap, weight).double()
        variance = mean_over_ranks((gap - mean.to(gap)) ** 2, weight).double()
        for name, new in (("mean", mean), ("std", variance.sqrt())):
            old = getattr(self, name).to(new.device)
            blended = torch.where(old.isnan(), new, decay * old + (1 - decay) * new)
            setattr(self, name, torch.where(variance > 0, blended, old))


@dataclass(frozen=True, kw_only=True)
class BetaDPO(PairMethod):
    """Diffusion-DPO with a beta per batch and without outliers.

    Attributes:
        scale: scale of log-ratios, above 0: a log-ratio is scale (r - m) / 2.
        beta: beta of a batch whose mean gap is the running mean, above 0.
        sensitivity: relative change of beta per unit of the mean gap (the paper's alpha), at least 0.
        filter: share of the pairs that is left out, in [0, 1).
        decay: decay of the running mean and deviation, in [0, 1).
        low: smallest beta, above 0.
        gaps: running statistics of the gaps; copies made by ``dataclasses.replace`` share it.
    """

    scale: float = 50000.0
    beta: float = 0.1
    sensitivity: float = 0.6
    filter: float = 0.2
    decay: float = 0.9
    low: float = 1e-3
    gaps: Gaps = field(default_factory=Gaps, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_positive(self, "scale", "beta", "low")
        for name in ("filter", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"method.{name}={getattr(self, name)}; allowed: 0 or more, less than 1")
        if not self.sensitivity >= 0:
            raise UserError(f"method.sensitivity={self.sensitivity}; allowed: 0 or more")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over the selected pairs that are not tied.

        With gradients enabled it is a collective operation.
        """
        c = compare(self, policy, reference, batch, generator)
        gap = self.scale * c.margin.detach()
        if torch.is_grad_enabled():
            self.gaps.update(gap, c.weight, self.decay)
            c = replace(c, weight=c.weight * self.selected(gap, c, batch, generator))
        beta = self.beta_of(gap, c.weight)
        losses = pair_losses(
            self.loss, beta * self.scale * c.chosen, beta * self.scale * c.rejected, c, batch
        )
        step = preference_step(c, losses, beta * self.scale)
        return Step(step.loss, {**step.metrics, "beta": beta}, step.weight)

    def beta_of(self, gap: Tensor, weight: Tensor) -> Tensor:
        """Return beta_used, a scalar, from gaps (P,) with weights (P,), 1 for selected pairs."""
        # beta (1 + sensitivity (mean of the selected gaps - M))
        usual = self.gaps.mean.to(gap).nan_to_num(0.0)
        off = torch.where(mean_over_ranks(weight) > 0, mean_over_ranks(gap, weight) - usual, 0.0)
        return (self.beta * (1 + self.sensitivity * off)).clamp(min=self.low)

    def selected(
        self, gap: Tensor, c: Contrast, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Tensor:
        """Return 1 for selected pairs and 0 for others, (P,); ties are never selected.

        The largest log-weights plus Gumbel noise are a draw without replacement (the Gumbel top-k trick).
        """
        group = batch.group[pairs_of(batch.group)[0]]
        position = torch.arange(len(group)) - torch.searchsorted(group, group)  # pairs are sorted by group
        width = int(position.max()) + 1 if len(group) else 1
        uniforms = uniform(generator, batch.num_groups, (width,)).cpu().double()
        draws = sent(uniforms[group, position], gap.device)
        std = self.gaps.std.to(gap).clamp(min=torch.finfo(gap.dtype).tiny)
        log_weight = (-(((gap - self.gaps.mean.to(gap)) / std) ** 2) / 2).nan_to_num(0.0)
        tiny = torch.finfo(torch.float64).tiny
        gumbel = -((-draws.clamp(min=tiny).log()).clamp(min=tiny).log())
        key = torch.where(c.weight > 0, log_weight.clamp(min=-1e6).double() + gumbel, -torch.inf)
        count = (c.count * (1 - self.filter) + 1e-6).floor().clamp(min=1)
        rank = key.argsort(descending=True).argsort()
        return (rank < count).to(c.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and deviation; empty before the first update."""
        if self.gaps.mean.isnan():
            return {}
        return {"mean": self.gaps.mean.item(), "std": self.gaps.std.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the result of ``state_dict``."""
        for name, value in state.items():
            setattr(self.gaps, name, torch.tensor(value, dtype=torch.float64))


CARD = MethodCard(
    name="beta_dpo",
    title="beta-DPO",
    paper="Wu et al., beta-DPO: Direct Preference Optimization with Dynamic beta",
    year=2024,
    arxiv="2407.08639",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=BetaDPO,
    soft=True,
)
