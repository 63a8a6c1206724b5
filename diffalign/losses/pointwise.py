"""Utilities of single samples, unreduced.

Diffusion-KTO (Li et al. 2024, arXiv 2404.04465, section 4) maximises a utility h of the value v of a sample,
its reward beta log p_policy / p_reference minus the batch's mean (``kl``); y is 1 for a desirable and -1 for
an undesirable sample. The loss is the mean of w_y (1 - h). ``value`` is in units of a logit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class Utility(Protocol):
    """The utility h of a sample's value."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return h of values (B, *unit), same shape; ``sign`` is y, 1 (desirable) or -1 (undesirable)."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(y v), Kahneman and Tversky's value function: risk-averse in gains, risk-seeking in losses.

    It is bounded on both sides, so that the gradient of an outlier or a wrong label vanishes.
    """

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return the utilities (B, *unit)."""
        return torch.sigmoid(sign * value)


@dataclass(frozen=True)
class LossAverse:
    """log sigmoid(y v), concave: the gradient of a bad sample does not vanish."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return the utilities (B, *unit)."""
        return logsigmoid(sign * value)


@dataclass(frozen=True)
class RiskSeeking1:
    """-y log sigmoid(-v), convex in the value of desirable samples: the gradient grows with the value."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return the utilities (B, *unit)."""
        return -sign * logsigmoid(-value)


@dataclass(frozen=True)
class RiskSeeking2:
    """y exp(v / softness) - 1, exponential.

    Attributes:
        softness: scale of the value, above 0; 100 in the released code.
    """

    softness: float = 100.0

    def __post_init__(self) -> None:
        if not self.softness > 0:
            raise ValueError(f"utility.softness={self.softness}; allowed: more than 0")

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return the utilities (B, *unit)."""
        return sign * torch.exp(value / self.softness) - 1


@dataclass(frozen=True)
class RiskSeeking3:
    """-log sigmoid(-y v), convex in y v."""

    def __call__(self, value: Tensor, sign: Tensor) -> Tensor:
        """Return the utilities (B, *unit)."""
        return -logsigmoid(-sign * value)


UTILITIES: Mapping[str, type[Utility]] = {
    "sigmoid": Sigmoid,
    "loss_averse": LossAverse,
    "risk_seeking_1": RiskSeeking1,
    "risk_seeking_2": RiskSeeking2,
    "risk_seeking_3": RiskSeeking3,
}
