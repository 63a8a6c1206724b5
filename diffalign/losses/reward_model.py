"""The loss of a reward model: the cross-entropy of a labelled choice between two scored samples.

PickScore's and SPO's criterion (Kirstain et al. 2023, arXiv 2305.01569, equation 2; Liang et al. 2024, arXiv
2406.04314, equation 8): with p = softmax of the two scores and labels l that sum to 1,

    loss = -l_0 log p_0 - l_1 log p_1, and for a tie (l_0 = l_1 = 1/2) log 1/2 more: a perfect tie costs 0.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def labelled_choice(
    first: Float[Tensor, " P"],
    second: Float[Tensor, " P"],
    label_first: Float[Tensor, " P"],
    label_second: Float[Tensor, " P"],
) -> Float[Tensor, " P"]:
    """Losses of P pairs of scores, unreduced.

    Args:
        first: scores of the first samples.
        second: scores of the second samples.
        label_first: share of the preference that the first has: 1, 0, or 1/2 for a tie.
        label_second: share of the second.
    """
    gap = first - second
    losses = -label_first * logsigmoid(gap) - label_second * logsigmoid(-gap)
    return losses - math.log(2) * (label_first == label_second).to(losses)


def weighted_mean(values: Float[Tensor, " P"], weight: Float[Tensor, " P"]) -> Tensor:
    """Scalar sum of ``values`` times ``weight`` over that of ``weight``; 0, with a gradient path, for none.

    SPO's weight of an example is 1 / the number of examples of its prompt.
    """
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1)
