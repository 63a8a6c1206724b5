"""Pairwise preference losses of rewards, unreduced.

The reward of a sample is beta times its log-ratio, log p_policy - log p_reference; most losses depend on the
logit h = chosen - rejected only. Parameters of a loss (a target, a share of wrong labels) are its fields, in
the unit of the reward, as in the papers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class PairwiseLoss(Protocol):
    """A loss of the rewards of two rivals, elementwise."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit) of the better and the worse samples, same shape."""
        ...


@dataclass(frozen=True)
class Logistic:
    """-log sigmoid(h), the Bradley-Terry likelihood (DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    Attributes:
        label_smoothing: probability e that a label is wrong, in [0, 0.5) (conservative DPO, Mitchell 2023):
            the loss is (1 - e) l(h) + e l(-h), whose optimum is the finite logit log((1 - e) / e).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}; allowed: 0 <= label_smoothing < 0.5"
            )

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        if not self.label_smoothing:
            return -logsigmoid(logit)
        return -(1 - self.label_smoothing) * logsigmoid(logit) - self.label_smoothing * logsigmoid(-logit)


@dataclass(frozen=True)
class IPO:
    """(h - 1 / (2 tau))^2 (Azar et al. 2023, arXiv 2310.12036, equation 17), with a finite optimal margin.

    Attributes:
        tau: the target of the logit is 1 / (2 tau); above 0.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        if self.tau <= 0:
            raise ValueError(f"loss.tau={self.tau}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        return (logit - 1 / (2 * self.tau)) ** 2


@dataclass(frozen=True)
class Hinge:
    """max(0, 1 - h) (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657)."""

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        return torch.relu(1 - logit)


@dataclass(frozen=True)
class Robust:
    """((1 - e) l(h) - e l(-h)) / (1 - 2 e) with l = -log sigmoid (Chowdhury et al. 2024, arXiv 2403.00409,
    equation 11).

    It is an unbiased estimate of the loss of clean labels, and not bounded below.

    Attributes:
        label_noise: share e of flipped labels, in [0, 0.5).
    """

    label_noise: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.label_noise < 0.5:
            raise ValueError(f"loss.label_noise={self.label_noise}; allowed: 0 <= label_noise < 0.5")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        e = self.label_noise
        return (-(1 - e) * logsigmoid(logit) + e * logsigmoid(-logit)) / (1 - 2 * e)


def reverse_kl(logit: Tensor, wrong: float) -> Tensor:
    """Return KL(p || q) of p = (sig(h), sig(-h)) and labels q = (1 - wrong, wrong), shaped like ``logit``."""
    correct = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-wrong))
    return correct + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(wrong))


@dataclass(frozen=True)
class EXO:
    """KL(p || q) of the policy's preference p = (sig(h), sig(-h)) and the smoothed label q = (1 - e, e).

    It is the mode-seeking direction (Ji et al. 2024, arXiv 2402.00856, equation 16); DPO's is KL(q || p). The
    optimum is the finite logit log((1 - e) / e). The gradient p (1 - p) (h - log((1 - e) / e)) vanishes where
    the policy strongly prefers the wrong sample.

    Attributes:
        label_smoothing: probability e that a label is wrong, in (0, 0.5).
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}; allowed: 0 < label_smoothing < 0.5"
            )

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return reverse_kl(chosen - rejected, self.label_smoothing)


@dataclass(frozen=True)
class ReverseKL:
    """KL(p || q) with p = sig(h) and q = 1 - alpha kept within [1e-6, 1 - 1e-6] (DMPO, Li et al. 2025, arXiv
    2507.07510, as released with Diffusion-SDPO).

    The formula is EXO's with another default.

    Attributes:
        alpha: probability that a label is wrong, in [0, 0.5).
    """

    alpha: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"loss.alpha={self.alpha}; allowed: 0 <= alpha < 0.5")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return reverse_kl(chosen - rejected, max(self.alpha, 1e-6))


@dataclass(frozen=True)
class NCA:
    """-log sig(c) - 1/2 log sig(-c) - 1/2 log sig(-r) (noise-contrastive alignment of a pair, Chen et al.
    2024, arXiv 2402.05369).

    The optimum of the chosen sample is finite, c = log 2, so that its likelihood does not fall.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO:
    """-log sig(c - d) - log sig(-(r - d)): a classifier of good against bad (binary classifier optimisation,
    Jung et al. 2024, arXiv 2404.04656, equation 12).

    The paper's d is the running mean of both rewards; TRL used it and later dropped it (d = 0, the default
    here). A mean over the micro-batch would make the loss depend on how a batch is split, and the mean of
    diffusion rewards stays near its initial value 0.

    Attributes:
        shift: reward level d, in units of the reward.
    """

    shift: float = 0.0

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return -logsigmoid(chosen - self.shift) - logsigmoid(self.shift - rejected)


@dataclass(frozen=True)
class SPPO:
    """(c - eta / 2)^2 + (r + eta / 2)^2 (self-play preference optimisation, SPPO, with hard labels).

    Source: Wu et al. 2024, arXiv 2405.00675, equation 4.7 with P = 1 and 0. Both rewards have a target. TRL's
    form, of log-ratios with a beta, is beta = 1 here and eta = 1 / beta.

    Attributes:
        eta: difference of the two targets, in units of the reward, above 0.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"loss.eta={self.eta}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return (chosen - self.eta / 2) ** 2 + (rejected + self.eta / 2) ** 2


@dataclass(frozen=True)
class APOZero:
    """1 - sig(c) + sig(r) (APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7).

    For winners that are better than the model's samples: it raises c and lowers r.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return (-chosen).sigmoid() + rejected.sigmoid()


@dataclass(frozen=True)
class APODown:
    """sig(c) + 1 - sig(h) (APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8).

    For winners that are worse than the model's samples: it lowers both, r more than c. At c = r = 0 the
    gradient to c is exactly 0, so that only the rejected sample moves at first.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True)
class DiscoPOP:
    """(1 - w) (-log sig(h)) + w exp(-h) with w = sig(h / tau), the log-ratio modulated loss.

    Source: a search by a language model, Lu et al. 2024, arXiv 2406.08414, equation 5. It is logistic where
    the order is wrong and exponential where it is right, and not convex: with tau .05 it has a local minimum
    at h = -0.12 and a local maximum at h = 0.07. At h = 0, where every run starts, its slope is +0.78, so the
    first step has the wrong sign; above tau 0.103 the slope at 0 is negative.

    Attributes:
        tau: width of the transition between the two losses, in units of the logit, above 0.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"loss.tau={self.tau}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        # One exponent for both factors: computed separately, exp(-h) overflows where the product is finite.
        exponential = torch.exp(logsigmoid(logit / self.tau) - logit)
        return -logsigmoid(logit) * (-logit / self.tau).sigmoid() + exponential


@dataclass(frozen=True)
class Poly:
    """-log p + alpha (1 - p) with p = sig(h) (Poly-DPO of ViPO, 2026, arXiv 2604.24953; no public code).

    The gradient of a pair has the magnitude (1 - p) (1 + alpha p), that of the logistic loss 1 - p. Alpha 3
    is Semi-DPO's "sce" loss (weight .5, log of zero -6).

    Attributes:
        alpha: at least -1, below which the gradient would change sign near p = 1. Above 0 it adds weight at a
            medium p (noisy labels), below 0 it removes weight (trivial pairs), 0 is Diffusion-DPO.
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (self.alpha >= -1 and math.isfinite(self.alpha)):
            raise ValueError(f"loss.alpha={self.alpha}; allowed: -1 or more")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Return the losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        return -logsigmoid(logit) + self.alpha * (-logit).sigmoid()


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
    "poly": Poly,
}
