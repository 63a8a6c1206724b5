"""What a preference of one sample over another demands of their rewards: unreduced losses.

The reward of a sample is beta times its log-ratio, log p_policy - log p_reference; most losses look at the
logit h = chosen - rejected alone. Whatever a loss has of its own (a target, a share of wrong labels) is a
field of it and in that same unit, so it means what its paper says.
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

    An unbiased estimate of the clean loss when a share ``e`` of the labels is flipped. Not bounded
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


def reverse_kl(logit: Tensor, wrong: float) -> Tensor:
    """KL(p || q) of p = (sig(h), sig(-h)) from the labels q = (1 - wrong, wrong), shaped like ``logit``."""
    right = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-wrong))
    return right + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(wrong))


@dataclass(frozen=True)
class EXO:
    """KL of the policy's preference (sig(h), sig(-h)) from the smoothed label (1 - e, e), the mode-seeking
    direction (Ji et al. 2024, arXiv 2402.00856, equation 16); DPO is the other one.

    Its optimum is the finite logit log((1 - e) / e). Where the policy is sure of the wrong order, the
    gradient p (1 - p) (h - log((1 - e) / e)) vanishes.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.label_smoothing < 0.5:
            raise ValueError(
                f"loss.label_smoothing={self.label_smoothing}; allowed: 0 < label_smoothing < 0.5"
            )

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return reverse_kl(chosen - rejected, self.label_smoothing)


@dataclass(frozen=True)
class ReverseKL:
    """KL(p || q) with p = sig(h) and q = 1 - alpha kept within [1e-6, 1 - 1e-6] (DMPO, Li et al. 2025, arXiv
    2507.07510, as released with Diffusion-SDPO).

    The formula is EXO's; what differs is how sure of the labels it is by default.
    """

    alpha: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 0.5:
            raise ValueError(f"loss.alpha={self.alpha}; allowed: 0 <= alpha < 0.5")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return reverse_kl(chosen - rejected, max(self.alpha, 1e-6))


@dataclass(frozen=True)
class NCA:
    """-log sig(c) - 1/2 log sig(-c) - 1/2 log sig(-r) (noise-contrastive alignment of a pair, Chen et al.
    2024, arXiv 2402.05369).

    It has a finite optimum for the chosen sample (c = log 2), so that its likelihood is held up.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO:
    """-log sig(c - d) - log sig(-(r - d)): a classifier of good against bad (binary classifier optimisation,
    Jung et al. 2024, arXiv 2404.04656, equation 12).

    ``shift`` is d, a level of reward. The paper takes the running mean of both rewards and TRL did so until
    it dropped the shift (d = 0, the default here). A mean over the micro-batch would make the loss depend on
    how a batch is split; diffusion rewards start at 0 and their mean stays near it.
    """

    shift: float = 0.0

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return -logsigmoid(chosen - self.shift) - logsigmoid(self.shift - rejected)


@dataclass(frozen=True)
class SPPO:
    """(c - eta / 2)^2 + (r + eta / 2)^2 (self-play preference optimisation with hard labels, Wu et al. 2024,
    arXiv 2405.00675, equation 4.7 with P = 1 and 0): each of the two has a target of its own.

    ``eta`` is in units of the reward, as IPO's 1 / tau is. TRL's form, over log-ratios with beta, is beta = 1
    here and eta = 1 / beta.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not self.eta > 0:
            raise ValueError(f"loss.eta={self.eta}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return (chosen - self.eta / 2) ** 2 + (rejected + self.eta / 2) ** 2


@dataclass(frozen=True)
class APOZero:
    """1 - sig(c) + sig(r) (APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7).

    For winners that are better than what the model makes: chosen up, rejected down.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return (-chosen).sigmoid() + rejected.sigmoid()


@dataclass(frozen=True)
class APODown:
    """sig(c) + 1 - sig(h) (APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8).

    For winners that are worse than what the model makes: both down, rejected further. At the start the pull
    on c cancels exactly, and only the rejected sample moves.
    """

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


@dataclass(frozen=True)
class DiscoPOP:
    """(1 - w) (-log sig(h)) + w exp(-h) with w = sig(h / tau) (the log-ratio modulated loss that a search by
    a language model found, Lu et al. 2024, arXiv 2406.08414, equation 5).

    Logistic where the order is wrong, exponential where it is right. Not convex: with tau .05 it has a valley
    at h = -0.12 and a bump at h = 0.07, and at h = 0, where every run starts, it pushes the wrong way (slope
    +0.78). Above tau 0.103 the slope at 0 is negative, as it should be.
    """

    tau: float = 0.05

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"loss.tau={self.tau}; allowed: more than 0")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
        logit = chosen - rejected
        # One exponent for both factors: apart, exp(-h) overflows long before sig(h / tau) pulls it back.
        exponential = torch.exp(logsigmoid(logit / self.tau) - logit)
        return -logsigmoid(logit) * (-logit / self.tau).sigmoid() + exponential


@dataclass(frozen=True)
class Poly:
    """-log p + alpha (1 - p) with p = sig(h) (Poly-DPO of ViPO, 2026, arXiv 2604.24953; no public code).

    A pair pulls with (1 - p) (1 + alpha p) where the logistic loss pulls with 1 - p: ``alpha`` above 0 adds
    weight at a middling p (noisy labels), below 0 it damps (trivial pairs), 0 is Diffusion-DPO. Below -1 the
    pull would turn round near p = 1. Alpha 3 is Semi-DPO's "sce" loss (weight .5, log of zero -6).
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not (self.alpha >= -1 and math.isfinite(self.alpha)):
            raise ValueError(f"loss.alpha={self.alpha}; allowed: -1 or more")

    def __call__(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Losses of rewards (P, *unit), same shape."""
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
