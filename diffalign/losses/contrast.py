"""From likelihood ratios of samples to margins of pairs, whatever the groups look like.

Every two members of a group are a pair, and the one with the higher score is the better one. A tie is a pair
of weight 0: it is masked, not dropped, so that shapes are the same on every rank, and it never counts as
"image 0 wins".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Contrast:
    """Pairs of rivals, better one first.

    Attributes:
        chosen: (P, *unit) log-ratio of the better sample.
        rejected: (P, *unit) log-ratio of the worse sample.
        gap: (P, *unit) score of the better minus that of the worse, 0 for a tie.
        weight: (P, *unit) 1, or 0 for a tie.
        better: (P, *unit) index of the better sample in the batch; of the first one for a tie.
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
        """(P, *unit): how much further the better sample has moved ahead, in log-likelihood."""
        return self.chosen - self.rejected

    @property
    def count(self) -> Tensor:
        """Scalar: the number of pairs (and units) that are no tie."""
        return self.weight.sum()

    def mean(self, values: Float[Tensor, " P *unit"]) -> Tensor:
        """Scalar mean of ``values`` over what is no tie; 0, with a gradient path, when everything is."""
        return (values * self.weight).sum() / self.weight.sum().clamp(min=1)

    def mean_per_pair(self, values: Float[Tensor, " P *unit"]) -> Float[Tensor, " P"]:
        """Return (P,) means of ``values`` over the units of each pair that are no tie; 0 where all are."""
        weight = self.weight.flatten(1)
        return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp(min=1)


def per_pair(c: Contrast, how: Literal["sum", "mean"]) -> Contrast:
    """One comparison a pair of its dense ones: log-ratios, each unit's on the side that it is on, added up or
    averaged over the units that are no tie. A pair of nothing but ties is a tie.

    ``better`` and ``worse`` are those of the pair's first unit: who is on which side differs by unit.
    """
    units = c.weight.flatten(1).sum(1)

    def pooled(v: Tensor) -> Tensor:
        return c.mean_per_pair(v) * (units if how == "sum" else 1)

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
    """By how much the first scores are higher: the usual lead."""
    return first - second


def pareto(first: Float[Tensor, "P R"], second: Float[Tensor, "P R"]) -> Float[Tensor, " P"]:
    """Return 1 where the first sample is at least as good by all R rewards and better by one, -1 where the
    second is, else 0: a tie (D3PO's rule for several rewards).
    """
    ahead = (first >= second).all(1) & (first > second).any(1)
    behind = (second >= first).all(1) & (second > first).any(1)
    return ahead.to(first) - behind.to(first)


def contrast(
    log_ratio: Float[Tensor, " B *unit"],
    score: Float[Tensor, " B *scores"],
    group: Int[Tensor, " B"],
    lead_of: Callable[[Tensor, Tensor], Tensor] = difference,
) -> Contrast:
    """All pairs of rivals of a batch.

    Args:
        log_ratio: (B, *unit) log p_policy - log p_reference.
        score: (B, *scores) higher is better: (B, *unit), where units may disagree about who wins (dense
            labels), or what ``lead_of`` reads, (B, R) for ``pareto``.
        group: (B,) who is whose rival, on the CPU.
        lead_of: scores of two rivals (P, ...) to who leads, (P, *unit): above 0 the first, 0 a tie.
    """
    first, second = (index.to(log_ratio.device) for index in pairs_of(group))
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
