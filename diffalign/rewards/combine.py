"""Combine the scores of several rewards into one: weighted sum, ranks, or won comparisons within a group.

A sum needs rewards of a common scale (`standardised`, or weights that make one). Ranks and wins need none:
they use only the order of the rivals under each reward.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.losses.comparisons import beaten

How = Literal["sum", "rank", "wins"]


def combine(
    scores: Float[Tensor, " *group K R"], weights: Sequence[float], how: How
) -> Float[Tensor, " *group K"]:
    """Combine R rewards into one score a sample.

    "sum" is the weighted sum. "rank" is Borda's count as a share, (number of worse rivals + half the number
    of equal ones) / (K - 1): 0 for the last, 1 for the first, 1/2 on average. "wins" is the share of
    comparisons won with a strictly greater score (Syn-Pic, Karthik et al. 2024, arXiv 2410.18013; with equal
    weights ``data.encoding.rating.wins``): a tie counts 0, where "rank" counts it 1/2. "rank" and "wins" are
    means over rewards weighted by |weight|. A negative weight reverses a reward in all three.

    Args:
        scores: (..., K, R), K rivals, R rewards; computed in float64, returned in their own dtype.
        weights: R weights.
        how: the rule.

    Raises:
        ValueError: the number of weights is not R.
    """
    factors = _factors(scores, weights)
    values = scores.double()
    if how == "sum":
        return (values * factors).sum(-1).to(scores.dtype)
    ties = 0.5 if how == "rank" else 0.0
    shares = beaten(values * factors.sign(), ties) / max(1, scores.shape[-2] - 1)
    return (shares * (factors.abs() / factors.abs().sum())).sum(-1).to(scores.dtype)


def towards_higher(
    scores: Float[Tensor, " *group K R"], weights: Sequence[float]
) -> Float[Tensor, " *group K R"]:
    """Return the scores, negated for rewards with a negative weight, so that higher is better in each column.

    Raises:
        ValueError: the number of weights is not R.
    """
    return (scores.double() * _factors(scores, weights).sign()).to(scores.dtype)


def standardised(scores: Float[Tensor, " *group R"]) -> Float[Tensor, " *group R"]:
    """Scale each reward to mean 0 and population std 1 over all samples, in float64.

    A reward that is constant becomes exactly 0.
    """
    values = scores.double()
    columns = values.flatten(0, -2)
    same = (columns == columns[:1]).all(0)
    std = columns.std(0, correction=0)
    return torch.where(same, 0.0, (values - columns.mean(0)) / torch.where(same, 1.0, std))


def standardised_in_groups(scores: Float[Tensor, " *group K R"]) -> Float[Tensor, " *group K R"]:
    """Scale each reward to mean 0 and population std 1 within its group of K rivals, in float64.

    Rivals with equal scores become exactly 0. The std is clamped to at least 1e-6 (as in Flow-Factory's
    GDPO), so that differences far below it, such as rounding errors, are not magnified to unit size.
    """
    values = scores.double()
    same = (values == values[..., :1, :]).all(-2, keepdim=True)
    std = values.std(-2, correction=0, keepdim=True).clamp(min=1e-6)
    return torch.where(same, 0.0, (values - values.mean(-2, keepdim=True)) / std)


def _factors(scores: Tensor, weights: Sequence[float]) -> Tensor:
    if scores.shape[-1] != len(weights):
        raise ValueError(f"{len(weights)} weights for scores of shape {tuple(scores.shape)}")
    return torch.tensor(list(weights), dtype=torch.float64, device=scores.device)
