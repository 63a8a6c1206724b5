"""From likelihood ratios of samples to margins of pairs, for groups of any size.

Every two members of a group are a pair; the one with the higher score is the better one. A tie is a pair of
weight 0: it is masked, not dropped, so that shapes are equal on all ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """Pairs of rivals, each with a better and a worse sample.

    Attributes:
        chosen: (P, *unit) log-ratio of the better sample.
        rejected: (P, *unit) log-ratio of the worse sample.
        gap: (P, *unit) score of the better minus that of the worse, 0 for a tie.
        weight: (P, *unit) 1, or 0 for a tie.
        better: (P, *unit) index of the better sample in the batch; for a tie the first sample of the pair.
        worse: (P, *unit) index of the worse sample.
    """

    chosen: Tensor
    rejected: Tensor
    gap: Tensor
    weight: Tensor
    better: Tensor
    worse: Tensor

    @property
    def margin(self) -> Tensor:
        """The difference of the log-ratios of the better and the worse sample, (P, *unit)."""
        return self.chosen - self.rejected

    @property
    def count(self) -> Tensor:
        """The number of pairs (times units) that are no tie, a scalar."""
        return self.weight.sum()

    def mean(self, values: Float[Tensor, " P *unit"]) -> Tensor:
        """Return the scalar mean of ``values`` without ties; 0, with gradient, if all are ties."""
        return (values * self.weight).sum() / self.weight.sum().clamp(min=1)

    def mean_per_pair(self, values: Float[Tensor, " P *unit"]) -> Float[Tensor, " P"]:
        """Return the means (P,) of ``values`` over the units of each pair without ties; 0 if all are ties."""
        weight = self.weight.flatten(1)
        return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp(min=1)


def per_pair(c: Contrast, reduction: Literal["sum", "mean"]) -> Contrast:
    """Return one comparison per pair from its dense ones.

    The log-ratios of each side are summed or averaged over the units that are no tie; the better side of each
    unit is that of its own label. A pair with ties only is a tie. ``better`` and ``worse`` are those of the
    pair's first unit.
    """
    units = c.weight.flatten(1).sum(1)

    def pooled(v: Tensor) -> Tensor:
        return c.mean_per_pair(v) * (units if reduction == "sum" else 1)

    return Contrast(
        chosen=pooled(c.chosen),
        rejected=pooled(c.rejected),
        gap=pooled(c.gap),
        weight=(units > 0).to(c.weight),
        better=c.better.flatten(1)[:, 0],
        worse=c.worse.flatten(1)[:, 0],
    )


def pairs_of(group: Int[Tensor, " B"]) -> tuple[Int[Tensor, " P"], Int[Tensor, " P"]]:
    """Return indices (i, j), i < j, of every two samples that share a group, in order of their group."""
    same = torch.triu(group[:, None] == group[None, :], diagonal=1)
    first, second = same.nonzero(as_tuple=True)
    order = group[first].argsort(stable=True)
    return first[order], second[order]


def difference(first: Tensor, second: Tensor) -> Tensor:
    """Return the first scores minus the second ones, the default lead."""
    return first - second


def pareto(first: Float[Tensor, "P R"], second: Float[Tensor, "P R"]) -> Float[Tensor, " P"]:
    """Return 1, -1 or 0 (a tie) for each pair by Pareto dominance (D3PO's rule for several rewards), (P,).

    A sample dominates if it is at least as good by all R rewards and better by one.
    """
    first_wins = (first >= second).all(1) & (first > second).any(1)
    second_wins = (second >= first).all(1) & (second > first).any(1)
    return first_wins.to(first) - second_wins.to(first)


def contrast(
    log_ratio: Float[Tensor, " B *unit"],
    score: Float[Tensor, " B *scores"],
    group: Int[Tensor, " B"],
    lead_of: Callable[[Tensor, Tensor], Tensor] = difference,
) -> Contrast:
    """Return all pairs of rivals of a batch.

    Args:
        log_ratio: (B, *unit) log p_policy - log p_reference.
        score: higher is better: (B, *unit), whose winner may differ by unit (dense labels), or the shape that
            ``lead_of`` reads, (B, R) for ``pareto``.
        group: (B,) group ids, equal for rivals, on the CPU.
        lead_of: function from the scores of the first and second rivals, (P, ...), to their lead (P, *unit):
            above 0 where the first is better, 0 for a tie.
    """
    first, second = (index.to(log_ratio.device, non_blocking=True) for index in pairs_of(group))
    lead = lead_of(score[first], score[second]).to(log_ratio)
    a, b = log_ratio[first], log_ratio[second]
    i, j = (index.reshape((-1,) + (1,) * (lead.ndim - 1)).expand(lead.shape) for index in (first, second))
    second_wins = lead < 0
    return Contrast(
        chosen=torch.where(second_wins, b, a),
        rejected=torch.where(second_wins, a, b),
        gap=lead.abs(),
        weight=lead.sign().abs(),
        better=torch.where(second_wins, j, i),
        worse=torch.where(second_wins, i, j),
    )
