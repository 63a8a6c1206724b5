"""Derivatives f'(u) of the divergences of f-DPO, as functions of log u, u = p_policy / p_reference.

Wang et al. 2023, "Beyond Reverse KL", arXiv 2309.16240, table 1, without constants (they cancel in a pair).
Regularised by an f-divergence, the reward that a policy stands for is beta f'(u): the log-ratio itself for
the reverse KL. So ``log u`` has to be in units of log-likelihood (a method's ``scale`` makes it so), and
exponents are clamped at 80, where float32 ends.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

_LARGEST = 80.0


@runtime_checkable
class Divergence(Protocol):
    """f' of the ratio, element by element."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """f'(u) of log u (any shape), up to a constant, same shape."""
        ...


@dataclass(frozen=True)
class ReverseKL:
    """f(u) = u log u: f' = log u. Plain DPO."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """f'(u) of log u (any shape), same shape."""
        return log_u


@dataclass(frozen=True)
class ForwardKL:
    """f(u) = -log u: f' = -1 / u."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """f'(u) of log u (any shape), same shape."""
        return -torch.exp((-log_u).clamp(max=_LARGEST))


@dataclass(frozen=True)
class JensenShannon:
    """f(u) = u log u - (1 + u) log((1 + u) / 2): f' = log(2 u / (1 + u)), bounded above by log 2."""

    def __call__(self, log_u: Tensor) -> Tensor:
        """f'(u) of log u (any shape), same shape."""
        return logsigmoid(log_u) + torch.log(torch.tensor(2.0).to(log_u))


@dataclass(frozen=True)
class Alpha:
    """f' = -u^-alpha / alpha: reverse KL as alpha goes to 0 (exactly at 0), forward KL at 1.

    TRL's coefficient is 1 - alpha.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"divergence.alpha={self.alpha}; allowed: 0 <= alpha <= 1")

    def __call__(self, log_u: Tensor) -> Tensor:
        """f'(u) of log u (any shape), same shape."""
        if not self.alpha:
            return log_u
        return -torch.exp((-self.alpha * log_u).clamp(max=_LARGEST)) / self.alpha


DIVERGENCES: Mapping[str, type[Divergence]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "jensen_shannon": JensenShannon,
    "alpha": Alpha,
}
