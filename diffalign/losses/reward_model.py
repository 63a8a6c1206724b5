"""Loss of a reward model: the cross-entropy of a labelled choice between two scored samples.

PickScore's and SPO's criterion (Kirstain et al. 2023, arXiv 2305.01569, equation 2; Liang et al. 2024, arXiv
2406.04314, equation 8): with p = softmax of the two scores and labels l that sum to 1,

    loss = -l_0 log p_0 - l_1 log p_1 - [l_0 = l_1] log 2,

so that the minimum for a tie (l_0 = l_1 = 1/2) is 0.
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
    """Return the losses of P pairs of scores, unreduced, (P,).

    Args:
        first: scores of the first samples.
        second: scores of the second samples.
        label_first: label of the first samples: 1, 0, or 1/2 for a tie.
        label_second: label of the second samples, 1 - ``label_first``.
    """
    gap = first - second
    losses = -label_first * logsigmoid(gap) - label_second * logsigmoid(-gap)
    return losses - math.log(2) * (label_first == label_second).to(losses)


def weighted_mean(values: Float[Tensor, " P"], weight: Float[Tensor, " P"]) -> Tensor:
    """Return sum(values weight) / sum(weight), a scalar; 0, with gradient, if all weights are 0.

    SPO's weight of an example is 1 / (number of examples of its prompt).
    """
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1)
