"""What a preference of one sample over another demands of their rewards: unreduced losses.

The reward of a sample is beta times its log-ratio, log p_policy - log p_reference; most losses look at the
logit h = chosen - rejected alone. Whatever a loss has of its own (a target, a share of wrong labels) is a
field of it and in that same unit, so it means what its paper says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.losses.recent import BCO, EXO, NCA, SPPO, APODown, APOZero, DiscoPOP, ReverseKL


@runtime_checkable
class PairwiseLoss(Protocol):
    """A loss of the rewards of two rivals, element by element."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit) of the better and the worse, same shape."""
        ...


@dataclass(frozen=True)
class Logistic:
    """-log sigmoid(h), the Bradley-Terry likelihood (DPO, Rafailov et al. 2023, arXiv 2305.18290, equation
    7).

    ``label_smoothing`` e takes labels to be wrong with probability e (conservative DPO, Mitchell 2023):
    (1 - e) l(h) + e l(-h). Its optimum is a finite logit, log((1 - e) / e).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}; allowed: 0 <= label_smoothing < 0.5"
            )

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        if not self.label_smoothing:
            return -logsigmoid(logit)
        return -(1 - self.label_smoothing) * logsigmoid(logit) - self.label_smoothing * logsigmoid(-logit)


@dataclass(frozen=True)
class IPO:
    """(h - 1 / (2 tau))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17): a target, hence no runaway
    margins.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"loss.tau={self.tau}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        return (logit - 1 / (2 * self.tau)) ** 2


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - h) (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657)."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        return torch.relu(1 - logit)


@dataclass(frozen=True)
class Robust:
    """((1 - e) l(h) - e l(-h)) / (1 - 2 e) with l = -log sigmoid (Chowdhury et al. 2024, arXiv 2403.00409,
    equation 11).

    An unbiased estimate of the clean loss when a share ``e`` of the labels is turned round. Not bounded
    below.
    """

    label_noise: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"loss.label_noise={self.label_noise}; allowed: 0 <= label_noise < 0.5")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        e = self.label_noise
        return (-(1 - e) * logsigmoid(logit) + e * logsigmoid(-logit)) / (1 - 2 * e)


LOSSES: Mapping[str, type[PairwiseLoss]] = {
    "logistic": Logistic,
    "ipo": IPO,
    "hinge": Hinge,
    "robust": Robust,
    "exo": EXO,
    "nca": NCA,
    "bco": BCO,
    "sppo": SPPO,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "discopop": DiscoPOP,
    "dmpo": ReverseKL,
}
