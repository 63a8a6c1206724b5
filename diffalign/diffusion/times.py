"""Which times are trained on: one per group, shared by rivals.

Draws are quantised to the model's own training steps (``steps``), because published recipes draw an integer
timestep; ``steps=None`` leaves them continuous. What that means depends on the path, so whoever draws says
on which path and for which latents (``fitted``):

    variance-preserving   floor(t N) / N, in 0 .. N-1 over N; a shift comes first
    flow                  a row of the scheduler's table, 1 .. N over N, and the shift of that: t is in (0, 1]

The table is the one that FlowMatchEulerDiscreteScheduler makes in its constructor, in float32, from the
noisiest time down: diffusers' training scripts and Flow-GRPO's look it up at floor(N u), so that their u is
1 - t here. (``set_timesteps`` of the same object would shift its ends a second time; diffusers #13243.)

A shift s maps t to s t / (1 + (s - 1) t), which spends more draws on high noise for larger images (SD3,
Esser et al. 2024, arXiv 2403.03206, section 5.3.2). ``shift: dynamic`` takes s = exp(mu), mu on a line over
the number of tokens, as FLUX, SD3.5 and LTX are sampled. ``line: null`` takes the model's own (FLUX's where
the path knows none).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.paths import RectifiedFlow, TokenLine
from diffalign.diffusion.randomness import normal, uniform
from diffalign.errors import UserError
from diffalign.types import Path, Random, TimeSampler

Shift = Literal["dynamic"] | float
"""A factor, or "dynamic": by the number of the latents' tokens."""


@runtime_checkable
class Fitting(Protocol):
    """A time sampler whose draws depend on the path, or on the latents' size."""

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` (without the batch axis) on a path."""
        ...


def fitted(sampler: TimeSampler, path: Path, shape: Sequence[int]) -> TimeSampler:
    """Return ``sampler`` for latents of ``shape`` on ``path``; one that does not care stays as it is."""
    return sampler.on(path, shape) if isinstance(sampler, Fitting) else sampler


def shifted(t: Tensor, shift: Shift) -> Tensor:
    """s t / (1 + (s - 1) t), shaped like ``t``; ``t`` itself for a shift of 1.

    Raises:
        UserError: a dynamic shift of latents that nobody has named.
    """
    if isinstance(shift, str):
        raise UserError(f"time.shift={shift!r} without latents; allowed here: a number")
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def table_row(u: Float[Tensor, " B"], steps: int, shift: Shift = 1.0) -> Float[Tensor, " B"]:
    """Row floor(N u) of the table of a flow scheduler's constructor, (B,) float64: u = 0 is the noisiest."""
    row = (steps - (u * steps).floor().clamp(0, steps - 1)).float() / steps
    return shifted(row, shift).double()


def _check(steps: int | None, shift: Shift) -> None:
    if steps is not None and steps < 1:
        raise UserError(f"time.steps={steps}; allowed: at least 1, or null for continuous times")
    if shift != "dynamic" and (isinstance(shift, str) or not shift > 0):
        raise UserError(f"time.shift={shift!r}; allowed: more than 0, or dynamic")


@dataclass(frozen=True)
class _OnFlow:
    """Continuous draws, looked up in a flow scheduler's table."""

    draw: "Uniform | LogitNormal | Mode"
    steps: int | None
    shift: Shift

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        t = self.draw.continuous(count, generator)
        return shifted(t, self.shift) if self.steps is None else table_row(1 - t, self.steps, self.shift)


def _factor(draw: "Uniform | LogitNormal | Mode | Listed", path: Path, shape: Sequence[int]) -> float:
    own = path.line if isinstance(path, RectifiedFlow) else None
    return (draw.line or own or TokenLine()).factor(shape)


def _on(draw: "Uniform | LogitNormal | Mode", path: Path, shape: Sequence[int]) -> TimeSampler:
    shift = _factor(draw, path, shape) if draw.shift == "dynamic" else draw.shift
    return _OnFlow(draw, draw.steps, shift) if isinstance(path, RectifiedFlow) else replace(draw, shift=shift)


@dataclass(frozen=True)
class Uniform:
    """t ~ U[low, high): over integer timesteps ceil(low N) .. ceil(high N) - 1 when ``steps`` is N; on a flow
    t ~ U(low, high].

    The default over 1000 steps is Diffusion-DPO's t ~ U{0 .. 999} (Wallace et al. 2023, arXiv 2311.12908).
    """

    low: float = 0.0
    high: float = 1.0
    steps: int | None = 1000
    shift: Shift = 1.0
    line: TokenLine | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.low < self.high <= 1.0:
            raise UserError(f"time: low={self.low}, high={self.high}; allowed: 0 <= low < high <= 1")
        _check(self.steps, self.shift)

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 times of a variance-preserving path."""
        u = uniform(generator, count).double()
        if self.steps is None:
            return shifted(self.low + (self.high - self.low) * u, self.shift)
        first, last = _ceil(self.low * self.steps), _ceil(self.high * self.steps)
        if first >= last:
            raise UserError(f"time: no timestep of {self.steps} lies in [{self.low}, {self.high})")
        t = (first + (u * (last - first)).floor()) / self.steps
        return t if self.shift == 1 else (shifted(t, self.shift) * self.steps).floor() / self.steps

    def continuous(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 in (low, high], before any shift."""
        return self.high - (self.high - self.low) * uniform(generator, count).double()

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` on ``path``."""
        return _on(self, path, shape)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n), n ~ N(0, 1) (SD3, Esser et al. 2024, arXiv 2403.03206, section 3.1), then
    time-shifted.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: Shift = 1.0
    steps: int | None = None
    line: TokenLine | None = None

    def __post_init__(self) -> None:
        _check(self.steps, self.shift)

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 times of a variance-preserving path."""
        t = shifted(self.continuous(count, generator), self.shift)
        return t if self.steps is None else (t * self.steps).floor() / self.steps

    def continuous(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 in (0, 1), before any shift."""
        return torch.sigmoid(self.mean + self.std * normal(generator, count).double())

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` on ``path``."""
        return _on(self, path, shape)


@dataclass(frozen=True)
class Mode:
    """t = 1 - u - s (cos(pi u / 2)^2 - 1 + u), u ~ U[0, 1), with s the ``scale`` (SD3, arXiv 2403.03206,
    section 3.1): more draws in the middle and, unlike logit-normal ones, some at the very ends. SD3's
    ablation has s = 1.29; 0 is uniform. The map is monotone for -1 <= s <= 2 / (pi - 2).
    """

    scale: float = 1.29
    shift: Shift = 1.0
    steps: int | None = None
    line: TokenLine | None = None

    def __post_init__(self) -> None:
        _check(self.steps, self.shift)
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(f"time.scale={self.scale}; allowed: -1 to {2 / (math.pi - 2):.4f}")

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 times of a variance-preserving path."""
        t = shifted(self.continuous(count, generator), self.shift)
        return t if self.steps is None else (t * self.steps).floor().clamp(max=self.steps - 1) / self.steps

    def continuous(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 in (0, 1], before any shift."""
        u = uniform(generator, count).double()
        return 1 - u - self.scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` on ``path``."""
        return _on(self, path, shape)


@dataclass(frozen=True)
class Listed:
    """Times drawn from a list with equal probability: for distilled models, which know only a few steps.

    SDXL-Turbo's released DPO recipe is ``Listed((0.249, 0.499, 0.749, 0.999))``. A shift is applied to them;
    a list that is taken from a shifted schedule has none.
    """

    times: tuple[float, ...]
    shift: Shift = 1.0
    line: TokenLine | None = None

    def __post_init__(self) -> None:
        if not self.times or not all(0.0 <= t <= 1.0 for t in self.times):
            raise UserError(f"time.times={self.times}; allowed: at least one time, each in [0, 1]")
        _check(None, self.shift)

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 times."""
        index = (uniform(generator, count) * len(self.times)).long().cpu()
        return shifted(torch.tensor(self.times, dtype=torch.float64)[index], self.shift)

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` on ``path``."""
        return replace(self, shift=_factor(self, path, shape)) if self.shift == "dynamic" else self


def _ceil(value: float) -> int:
    # 0.3 * 1000 is 299.99999999999994 or 300 depending on the factor: a hair must not add a timestep.
    return int(-(-round(value, 9) // 1))
