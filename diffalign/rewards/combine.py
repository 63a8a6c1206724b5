"""Several scores become one: by a weighted sum, by ranks, or by won comparisons among the rivals of a prompt.

Sums need a common scale (`standardised`, or weights that make one); ranks and wins need none, since they look
at one reward at a time and only at the order of the rivals.
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
    """One score of R.

    "sum" is the weighted sum. "rank" is Borda's count as a share, (rivals that are worse + half of those that
    are equal) / (K - 1): 0 for the last, 1 for the first, 1/2 on average. "wins" is the share of won
    comparisons, strictly greater wins (Syn-Pic, Karthik et al. 2024, arXiv 2410.18013; with equal weights
    ``data.encoding.rating.wins``): unlike "rank" it gives equal scores nothing instead of a half. Both are
    means over rewards weighted by |weight|. A negative weight reverses a reward in all of them.

    Args:
        scores: (..., K, R), K rivals; computed in float64, given back in their own dtype.
        weights: R.
        how: to combine.

    Raises:
        ValueError: another number of weights than of rewards.
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
    """Return the scores, negated for rewards with a negative weight: higher is better in every
    column.

    Raises:
        ValueError: another number of weights than of rewards.
    """
    return (scores.double() * _factors(scores, weights).sign()).to(scores.dtype)


def standardised(scores: Float[Tensor, " *group R"]) -> Float[Tensor, " *group R"]:
    """Each of the R last columns to mean 0 and std 1 (dividing by their number), in float64; one that is the
    same everywhere to 0, exactly.
    """
    values = scores.double()
    columns = values.flatten(0, -2)
    same = (columns == columns[:1]).all(0)
    std = columns.std(0, correction=0)
    return torch.where(same, 0.0, (values - columns.mean(0)) / torch.where(same, 1.0, std))


def standardised_in_groups(scores: Float[Tensor, " *group K R"]) -> Float[Tensor, " *group K R"]:
    """Return each reward of K rivals scaled to mean 0 and std 1 (dividing by K), in float64; of rivals that
    are all equal 0, exactly.

    The std is at least 1e-6 (Flow-Factory's GDPO): rounding errors of a reward above that count in full.
    """
    values = scores.double()
    same = (values == values[..., :1, :]).all(-2, keepdim=True)
    std = values.std(-2, correction=0, keepdim=True).clamp(min=1e-6)
    return torch.where(same, 0.0, (values - values.mean(-2, keepdim=True)) / std)


def _factors(scores: Tensor, weights: Sequence[float]) -> Tensor:
    if scores.shape[-1] != len(weights):
        raise ValueError(f"{len(weights)} weights for scores of shape {tuple(scores.shape)}")
    return torch.tensor(list(weights), dtype=torch.float64, device=scores.device)
