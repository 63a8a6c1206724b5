"""Won comparisons among the rivals of a group, which need no scale of the scores, only their order."""

import torch
from jaxtyping import Float
from torch import Tensor


def beaten(scores: Float[Tensor, " *group K R"], ties: float = 0.0) -> Float[Tensor, " *group K R"]:
    """Return how many of its K - 1 rivals each one beats, for each of R scores, in float64.

    Args:
        scores: (..., K, R), higher is better.
        ties: what an equal rival counts.
    """
    columns = scores.double().transpose(-1, -2).contiguous()
    order = columns.sort(-1).values
    worse = torch.searchsorted(order, columns)
    equal = torch.searchsorted(order, columns, right=True) - worse - 1
    return (worse + ties * equal.double()).transpose(-1, -2)
