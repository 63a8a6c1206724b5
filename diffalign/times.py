"""Which times are trained on: one per group, shared by rivals.

Draws are quantised to the model's own training steps (``steps``), because published variance-preserving
recipes draw an integer timestep; ``steps=None`` leaves them continuous, for flow models.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.randomness import normal, uniform
from diffalign.types import Random


@dataclass(frozen=True)
class Uniform:
    """t ~ U[low, high): over integer timesteps ceil(low N) .. ceil(high N) - 1 when ``steps`` is N.

    The default over 1000 steps is Diffusion-DPO's t ~ U{0 .. 999} (Wallace et al. 2023, arXiv 2311.12908).
    """

    low: float = 0.0
    high: float = 1.0
    steps: int | None = 1000

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise UserError(f"time: low={self.low}, high={self.high}; allowed: 0 <= low < high <= 1")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"time.steps={self.steps}; allowed: at least 1, or null for continuous times")

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """(count,) float64 times."""
        u = uniform(generator, count).double()
        if self.steps is None:
            return self.low + (self.high - self.low) * u
        first, last = _ceil(self.low * self.steps), _ceil(self.high * self.steps)
        if first >= last:
            raise UserError(f"time: no timestep of {self.steps} lies in [{self.low}, {self.high})")
        return (first + (u * (last - first)).floor()) / self.steps


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n), n ~ N(0, 1) (SD3, Esser et al. 2024, arXiv 2403.03206, section 3.1), then
    time-shifted.

    ``shift`` s maps t to s t / (1 + (s - 1) t), which spends more draws on high noise for larger images.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    steps: int | None = None

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """(count,) float64 times."""
        t = torch.sigmoid(self.mean + self.std * normal(generator, count).double())
        t = self.shift * t / (1 + (self.shift - 1) * t)
        return t if self.steps is None else (t * self.steps).floor() / self.steps


@dataclass(frozen=True)
class Listed:
    """Times drawn from a list with equal probability: for distilled models, which know only a few steps.

    SDXL-Turbo's released DPO recipe is ``Listed((0.249, 0.499, 0.749, 0.999))``.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.times or not all(0.0 <= t <= 1.0 for t in self.times):
            raise UserError(f"time.times={self.times}; allowed: at least one time, each in [0, 1]")

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """(count,) float64 times."""
        index = (uniform(generator, count) * len(self.times)).long().cpu()
        return torch.tensor(self.times, dtype=torch.float64)[index]


def _ceil(value: float) -> int:
    # 0.3 * 1000 is 299.99999999999994 or 300 depending on the factor: a hair must not add a timestep.
    return int(-(-round(value, 9) // 1))
