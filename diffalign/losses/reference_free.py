"""Reference-free preference losses of two denoising errors, unreduced.

``winner`` and ``loser`` are the policy's mean squared errors m_w and m_l of the better and the worse sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class ErrorLoss(Protocol):
    """A loss of the denoising errors of two rivals, elementwise."""

    def logit(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return the argument of the sigmoid, (P, *unit): positive where the better error is lower."""
        ...

    def __call__(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return the losses of errors (P, *unit) of the better and the worse samples, same shape."""
        ...


def _positive(section: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{section}.{name}={value}; allowed: more than 0")


def amplified(x: Tensor) -> Tensor:
    """Return x / (exp(x) - 1) of x >= 0, elementwise; its value at 0 is 1 and its slope -1/2."""
    # Near 0 the derivative of the quotient has a cancellation; the series is exact there to 1e-22.
    small = x.abs() < 1e-2
    safe = torch.where(small, torch.ones_like(x), x)
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240
    return torch.where(small, series, safe / torch.expm1(safe))


@dataclass(frozen=True)
class Released:
    """m_w - beta log sigmoid(T (phi(m_w) - phi(m_l))), phi(x) = snr x / (exp(snr x) - 1): MaPO as released.

    The slope of phi at 0 is -snr / 2, so the logit is about T snr / 2 (m_l - m_w) = 250 (m_l - m_w): that of
    a reference-free DPO at beta 500, beside the fine-tuning term m_w.

    Attributes:
        beta: weight of the preference term beside the fine-tuning term, above 0 (``beta_mapo``).
        snr: factor of the errors in phi, above 0 (``snr_value`` of the released code).
        timesteps: number T of training timesteps.
    """

    beta: float = 0.1
    snr: float = 0.5
    timesteps: float = 1000.0

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta, snr=self.snr, timesteps=self.timesteps)

    def logit(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return T (phi(m_w) - phi(m_l)), (P, *unit)."""
        return self.timesteps * (amplified(self.snr * winner) - amplified(self.snr * loser))

    def __call__(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return the losses of errors (P, *unit), same shape."""
        return winner - self.beta * logsigmoid(self.logit(winner, loser))


@dataclass(frozen=True)
class Paper:
    """m_w - 1 / beta log sigmoid(phi(m_w) - phi(m_l)), phi(x) = (x / (exp(x) - 1))^beta: MaPO as printed.

    Source: equations 9 to 11 of the AAAI text, which have no factor T.

    Attributes:
        beta: above 0; a larger one gives the fine-tuning term more weight. The paper's best values are 8
            (preference), 32 (culture), 64 (safety, style) and 1024 (personalisation).
    """

    beta: float = 8.0

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta)

    def logit(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return phi(m_w) - phi(m_l), (P, *unit)."""
        return amplified(winner) ** self.beta - amplified(loser) ** self.beta

    def __call__(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return the losses of errors (P, *unit), same shape."""
        return winner - logsigmoid(self.logit(winner, loser)) / self.beta


@dataclass(frozen=True)
class ORPO:
    """m_w - beta log sigmoid(m_l - m_w): ORPO (Hong et al. 2024, arXiv 2403.07691) with denoising errors.

    Attributes:
        beta: weight of the preference term, above 0.
        sign: "corrected", or "released": the logit m_w - m_l of diffusers' example script, which raises the
            winner's error; for comparison only.
    """

    beta: float = 0.1
    sign: Literal["corrected", "released"] = "corrected"

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta)

    def logit(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return m_l - m_w, (P, *unit), or its negative with sign "released"."""
        return loser - winner if self.sign == "corrected" else winner - loser

    def __call__(self, winner: Tensor, loser: Tensor) -> Tensor:
        """Return the losses of errors (P, *unit), same shape."""
        return winner - self.beta * logsigmoid(self.logit(winner, loser))


FORMS: Mapping[str, type[ErrorLoss]] = {"released": Released, "paper": Paper, "orpo": ORPO}
