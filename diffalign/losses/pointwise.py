"""Utilities of single samples: losses of one reward at a time, unreduced.

Diffusion-KTO (Li et al. 2024, arXiv 2404.04465, section 4) maximises a utility h of the value v of a sample,
its reward beta log p_policy / p_reference minus the batch's mean (``kl``), negated (y = -1) where the
sample is undesirable. The loss is the mean of w_y (1 - h). ``value`` is in the unit of a logit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class Utility(Protocol):
    """How good it is that a sample has some value."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """h of values (B, *unit), ``sign`` 1 for desirable and -1 for undesirable samples; same shape."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(y v), Kahneman and Tversky's value function: averse to risk in gains, seeking it in losses.

    Bounded on both sides, so that neither an outlier nor a wrong label pulls for ever.
    """

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Utilities (B, *unit)."""
        return torch.sigmoid(sign * value)


@dataclass(frozen=True)
class LossAverse:
    """log sigmoid(y v), concave: what is bad hurts in proportion."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Utilities (B, *unit)."""
        return logsigmoid(sign * value)


@dataclass(frozen=True)
class RiskSeeking1:
    """-y log sigmoid(-v), convex in the value: the further a sample has come, the harder it is pulled."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Utilities (B, *unit)."""
        return -sign * logsigmoid(-value)


@dataclass(frozen=True)
class RiskSeeking2:
    """y exp(v / softness) - 1, the exponential one; 100 is the released softness."""

    softness: float = 100.0

    def __post_init__(self) -> None:
        if not self.softness > 0:
            raise ValueError(f"utility.softness={self.softness}; allowed: more than 0")

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Utilities (B, *unit)."""
        return sign * torch.exp(value / self.softness) - 1


@dataclass(frozen=True)
class RiskSeeking3:
    """-log sigmoid(-y v), convex in y v."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Utilities (B, *unit)."""
        return -logsigmoid(-sign * value)


UTILITIES: Mapping[str, type[Utility]] = {
    "sigmoid": Sigmoid,
    "loss_averse": LossAverse,
    "risk_seeking_1": RiskSeeking1,
    "risk_seeking_2": RiskSeeking2,
    "risk_seeking_3": RiskSeeking3,
}
