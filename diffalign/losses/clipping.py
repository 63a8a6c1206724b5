"""Limits on the log-ratio of negative samples; all of them are ours.

The paper of text preference optimisation (arXiv 2509.25771) reports that clipping the negative term
stabilises training, without a formula. ``policy`` and ``reference`` are log-likelihood estimates, minus half
the denoising errors m and r; limits are in units of those errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Clip(Protocol):
    """A limit on the log-ratio of negative samples."""

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Return limited log-ratios of log-likelihoods (B, *unit), same shape."""
        ...


@dataclass(frozen=True)
class Unlimited:
    """No limit."""

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Return log-ratios (B, *unit) of log-likelihoods of that shape."""
        return policy - reference


@dataclass(frozen=True)
class Clamp:
    """Clamp r - m to [-limit, limit] (ours); outside a negative sample has no gradient.

    Attributes:
        limit: bound of the difference of mean squared errors, above 0.
    """

    limit: float = 1e-3

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"clip.limit={self.limit}; allowed: more than 0")

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Return log-ratios (B, *unit) of log-likelihoods of that shape."""
        return (policy - reference).clamp(-self.limit / 2, self.limit / 2)


@dataclass(frozen=True)
class Stop:
    """Stop the gradient where m > (1 + excess) r (ours); values are unchanged.

    Attributes:
        excess: largest relative rise of the policy's error over the reference's, at least 0.
    """

    excess: float = 0.1

    def __post_init__(self) -> None:
        if not self.excess >= 0:
            raise ValueError(f"clip.excess={self.excess}; allowed: 0 or more")

    def __call__(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Return log-ratios (B, *unit) of log-likelihoods of that shape."""
        ratio = policy - reference
        return torch.where(-policy > (1 + self.excess) * -reference, ratio.detach(), ratio)


CLIPS: Mapping[str, type[Clip]] = {"none": Unlimited, "clamp": Clamp, "stop": Stop}
