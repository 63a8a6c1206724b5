"""Pairwise losses of 2024 and 2025, over the same two rewards as those of ``pairwise`` and in its table.

``h`` is the logit chosen - rejected, ``c`` and ``r`` are the rewards of the chosen and the rejected sample
(beta times the log-ratio), sig is the logistic function. Losses of ``c`` and ``r`` apart also say where each
of the two has to go, which a loss of ``h`` alone leaves open: the likelihood of both may fall under it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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
