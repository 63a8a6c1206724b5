"""How far a loser may be pushed away: limits on the log-ratio of negative samples. All of them are ours.

The paper of text preference optimisation (arXiv 2509.25771) says that a clipping of the negative term
stabilises training; its formula has not been published, so these are stand-ins. ``policy`` and ``reference``
are log-likelihood estimates, minus half the denoising errors m and r; limits are in units of those errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Clip(Protocol):
    """The log-ratio of negative samples, limited."""

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Log-ratios of log-likelihoods (B, *unit), same shape."""
        ...


@dataclass(frozen=True)
class Unlimited:
    """The log-ratio as it is."""

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Log-ratios (B, *unit)."""
        return policy - reference


@dataclass(frozen=True)
class Clamp:
    """r - m clamped to [-limit, limit] (ours): beyond it a negative has no gradient."""

    limit: float = 1e-3

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"clip.limit={self.limit}; allowed: more than 0")

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Log-ratios (B, *unit)."""
        return (policy - reference).clamp(-self.limit / 2, self.limit / 2)


@dataclass(frozen=True)
class Stop:
    """No gradient once m > (1 + excess) r (ours): the value stays, so the logit is that of the method."""

    excess: float = 0.1

    def __post_init__(self) -> None:
        if not self.excess >= 0:
            raise ValueError(f"clip.excess={self.excess}; allowed: 0 or more")

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Log-ratios (B, *unit)."""
        ratio = policy - reference
        return torch.where(-policy > (1 + self.excess) * -reference, ratio.detach(), ratio)


CLIPS: Mapping[str, type[Clip]] = {"none": Unlimited, "clamp": Clamp, "stop": Stop}
