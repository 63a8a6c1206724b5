"""Derivatives f'(u) of the divergences of f-DPO, as functions of log u, u = p_policy / p_reference.

Wang et al. 2023, "Beyond Reverse KL", arXiv 2309.16240, table 1, without constants (they cancel in a pair).
The implicit reward of a policy that is regularised by an f-divergence is beta f'(u); for the reverse KL f'(u)
is the log-ratio. ``log u`` must be in units of log-likelihood, which a method's ``scale`` ensures. Exponents
are clamped at 80, near the limit of float32.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LARGEST = 80.0


@runtime_checkable
class Divergence(Protocol):
    """The derivative f' of a divergence, as a function of the log-ratio, elementwise."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """Return f'(u) of log u (any shape), up to a constant, same shape."""
        ...


@dataclass(frozen=True)
class ReverseKL:
    """Reverse KL, f(u) = u log u with f' = log u: DPO."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """Return f'(u) of log u (any shape), same shape."""
        return log_u


@dataclass(frozen=True)
class ForwardKL:
    """Forward KL, f(u) = -log u with f' = -1 / u."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """Return f'(u) of log u (any shape), same shape."""
        return -torch.exp((-log_u).clamp(max=_LARGEST))


@dataclass(frozen=True)
class JensenShannon:
    """Jensen-Shannon, f(u) = u log u - (1 + u) log((1 + u) / 2) with f' = log(2 u / (1 + u)) < log 2."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """Return f'(u) of log u (any shape), same shape."""
        return logsigmoid(log_u) + math.log(2)


@dataclass(frozen=True)
class Alpha:
    """Alpha divergence, f' = -u^-alpha / alpha: the reverse KL at 0, the forward KL at 1.

    Attributes:
        alpha: order of the divergence, in [0, 1]; TRL's coefficient is 1 - alpha.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"divergence.alpha={self.alpha}; allowed: 0 <= alpha <= 1")

    def __call__(self, log_u: Tensor) -> Tensor:
        """Return f'(u) of log u (any shape), same shape."""
        if not self.alpha:
            return log_u
        return -torch.exp((-self.alpha * log_u).clamp(max=_LARGEST)) / self.alpha


DIVERGENCES: Mapping[str, type[Divergence]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "jensen_shannon": JensenShannon,
    "alpha": Alpha,
}
