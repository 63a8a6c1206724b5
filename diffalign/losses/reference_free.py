"""Preference losses of two denoising errors without a reference, unreduced.

``won`` and ``lost`` are the policy's mean squared errors on the better and on the worse sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class ErrorLoss(Protocol):
    """A loss of the errors of two rivals, element by element."""

    def logit(self, won: Tensor, lost: Tensor) -> Tensor:
        """Return the argument of the sigmoid, (P, *unit): positive where the better sample is ahead."""
        ...

    def __call__(self, won: Tensor, lost: Tensor) -> Tensor:
        """Losses of errors (P, *unit) of the better and the worse, same shape."""
        ...


def _positive(place: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{place}.{name}={value}; allowed: more than 0")


def amplified(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) of x >= 0, elementwise: 1 at 0, falling with slope -1/2 there."""
    # Near 0 the quotient's derivative cancels; the series is exact there to 1e-22.
    small = x.abs() < 1e-2
    safe = torch.where(small, torch.ones_like(x), x)
    series = 1 - x / 2 + x**2 / 12 - x**4 / 720 + x**6 / 30240
    return torch.where(small, series, safe / torch.expm1(safe))


@dataclass(frozen=True)
class Released:
    """m_w - beta log sigmoid(T (phi(m_w) - phi(m_l))), phi(x) = snr x / (exp(snr x) - 1): MaPO as released.

    phi falls with slope -snr / 2 at 0, so the logit is about T snr / 2 (m_l - m_w) = 250 (m_l - m_w): a DPO
    without reference at our beta 500, beside the fine-tuning term m_w.

    Attributes:
        beta: weight of the preference beside the fine-tuning term (``beta_mapo``).
        snr: ``snr_value`` of the released code.
        timesteps: T, the training timesteps.
    """

    beta: float = 0.1
    snr: float = 0.5
    timesteps: float = 1000.0

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta, snr=self.snr, timesteps=self.timesteps)

    def logit(self, won: Tensor, lost: Tensor) -> Tensor:
        """Return T (phi(m_w) - phi(m_l)), (P, *unit)."""
        return self.timesteps * (amplified(self.snr * won) - amplified(self.snr * lost))

    def __call__(self, won: Tensor, lost: Tensor) -> Tensor:
        """Losses of errors (P, *unit), same shape."""
        return won - self.beta * logsigmoid(self.logit(won, lost))


@dataclass(frozen=True)
class Paper:
    """m_w - 1 / beta log sigmoid(phi(m_w) - phi(m_l)), phi(x) = (x / (exp(x) - 1))^beta: MaPO as printed in
    equations 9 to 11 of the AAAI text, with no factor T.

    Attributes:
        beta: the larger, the more fine-tuning; the paper's best are 8 (preference), 32 (culture), 64 (safety,
            style) and 1024 (personalisation).
    """

    beta: float = 8.0

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta)

    def logit(self, won: Tensor, lost: Tensor) -> Tensor:
        """phi(m_w) - phi(m_l), (P, *unit)."""
        return amplified(won) ** self.beta - amplified(lost) ** self.beta

    def __call__(self, won: Tensor, lost: Tensor) -> Tensor:
        """Losses of errors (P, *unit), same shape."""
        return won - logsigmoid(self.logit(won, lost)) / self.beta


@dataclass(frozen=True)
class ORPO:
    """m_w - beta log sigmoid(m_l - m_w): the odds-ratio idea (Hong et al. 2024, arXiv 2403.07691) on errors.

    The example script of diffusers has m_w - m_l inside, which pushes the winner's error up;
    ``sign="released"`` is that, for comparison only.
    """

    beta: float = 0.1
    sign: Literal["corrected", "released"] = "corrected"

    def __post_init__(self) -> None:
        _positive("form", beta=self.beta)

    def logit(self, won: Tensor, lost: Tensor) -> Tensor:
        """m_l - m_w, (P, *unit), or its negative."""
        return lost - won if self.sign == "corrected" else won - lost

    def __call__(self, won: Tensor, lost: Tensor) -> Tensor:
        """Losses of errors (P, *unit), same shape."""
        return won - self.beta * logsigmoid(self.logit(won, lost))


FORMS: Mapping[str, type[ErrorLoss]] = {"released": Released, "paper": Paper, "orpo": ORPO}
