"""Surrogates of a log-density from a squared denoising error, which AWM weights by advantages.

Xue et al. 2025, "Advantage Weighted Matching", arXiv 2509.25050, and its released code.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def surrogate_log_density(
    error: Float[Tensor, " B"], t: Float[Tensor, " B"], weighting: Weighting, power: float = 0.25
) -> Float[Tensor, " B"]:
    """Return minus a weighted mean squared ``error`` m at times ``t``, (B,).

    By ``weighting``, with p = ``power``:

        uniform  -m
        t        -m t
        t2       -m t^2
        huber    -(sqrt(m + 1e-10) - 1e-5) t
        ghuber   -((m + 1e-10)^p - 1e-10^p) t / p
    """
    if weighting == "uniform":
        return -error
    if weighting in ("t", "t2"):
        return -error * t ** (2 if weighting == "t2" else 1)
    p = 0.5 if weighting == "huber" else power
    rise = (error + 1e-10) ** p - 1e-10**p
    return -rise * t / (1 if weighting == "huber" else p)


def elbo_weight(t: Float[Tensor, " B"], level: float = 0.7) -> Float[Tensor, " B"]:
    """Return 1 / (2 g^2) with g = level sqrt(t / (1 - min(t, 0.99))), (B,).

    It weights a squared difference of velocities like the KL of Flow-GRPO's SDE with noise g.
    """
    return (1 - t.clamp(max=0.99)) / (2 * level**2 * t)


def group_softmax(values: Float[Tensor, "S B"], group: Tensor) -> Float[Tensor, "S B"]:
    """Return the softmax of each row of ``values`` within the groups (B,)."""
    index = group.to(values.device, non_blocking=True)
    top = values.new_full((len(values), int(group.max()) + 1), -torch.inf)
    top = top.scatter_reduce(1, index.expand_as(values), values, "amax")
    weight = (values - top[:, index]).exp()
    return weight / group_sums(weight, group)


def group_sums(values: Float[Tensor, "S B"], group: Tensor) -> Float[Tensor, "S B"]:
    """Return for each value the sum of its row over its group (B,)."""
    count = int(group.max()) + 1
    sums = torch.zeros(len(values), count, dtype=values.dtype, device=values.device)
    index = group.to(values.device, non_blocking=True)
    return sums.index_add(1, index, values)[:, index]
