"""Numbers of won comparisons among rivals: they depend on the order of scores, not on their scale."""

import torch
from jaxtyping import Float
from torch import Tensor


def beaten(scores: Float[Tensor, " *group K R"], ties: float = 0.0) -> Float[Tensor, " *group K R"]:
    """Return the number of the K - 1 rivals that each sample beats, for each of R scores, in float64.

    Args:
        scores: (..., K, R), higher is better.
        ties: count of a rival with an equal score, for example 1/2.
    """
    columns = scores.double().transpose(-1, -2).contiguous()
    order = columns.sort(-1).values
    worse = torch.searchsorted(order, columns)
    equal = torch.searchsorted(order, columns, right=True) - worse - 1
    return (worse + ties * equal.double()).transpose(-1, -2)
