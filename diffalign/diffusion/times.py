"""Distributions of the training time: one time per group, shared by rivals.

Draws are quantised to the model's training steps (``steps``), because published recipes draw an integer
timestep; ``steps=None`` leaves them continuous. The quantisation and a dynamic shift depend on the path and
on the size of the latents, so a sampler is adapted to both before use (``fitted``):

    variance-preserving   floor(t N) / N, in {0 .. N-1} / N; a shift is applied first
    flow                  a row of the scheduler's table, {1 .. N} / N, shifted: t is in (0, 1]

The table is that of FlowMatchEulerDiscreteScheduler's constructor, in float32, in descending order of noise.
The training scripts of diffusers and of Flow-GRPO read row floor(N u), so their u is 1 - t here.
(``set_timesteps`` of the same object shifts the ends a second time; diffusers #13243.)

A shift s > 1 maps t to s t / (1 + (s - 1) t) and so moves draws to higher noise, for larger images (SD3,
Esser et al. 2024, arXiv 2403.03206, section 5.3.2). ``shift: dynamic`` has s = exp(mu) with mu linear in the
number of tokens, as in the pipelines of FLUX, SD3.5 and LTX. ``line: null`` takes the line of the model's
path, or FLUX's if the path has none.
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
from diffalign.diffusion.spans import ALL, in_span, span_of
from diffalign.errors import UserError
from diffalign.types import Path, Random, TimeSampler

Shift = Literal["dynamic"] | float
"""A factor above 0, or "dynamic": computed from the number of tokens of the latents."""


@runtime_checkable
class Fitting(Protocol):
    """A time sampler whose draws depend on the path or on the size of the latents."""

    def on(self, path: Path, shape: Sequence[int]) -> TimeSampler:
        """Return the sampler for latents of ``shape`` (without the batch axis) on ``path``."""
        ...


def fitted(sampler: TimeSampler, path: Path, shape: Sequence[int]) -> TimeSampler:
    """Return ``sampler`` for latents of ``shape`` on ``path``; one that depends on neither is returned.

    For a network that is called at some times only (``RectifiedFlow.span``), draws are conditioned on them.

    Raises:
        UserError: a configured range or list with times at which the network is not called.
    """
    fitting = sampler.on(path, shape) if isinstance(sampler, Fitting) else sampler
    low, high = span_of(path)
    if (low, high) == ALL:
        return fitting
    chosen = _chosen(fitting)
    if chosen and not low <= min(chosen) <= max(chosen) <= high:
        raise UserError(
            f"method.time gives times {min(chosen):g} to {max(chosen):g}, and the expert that is trained "
            f"(model.expert) is called at {low:g} to {high:g}; allowed: times within, or all (low 0, high "
            "1), of which the expert's are drawn"
        )
    return Within(fitting, path)


def _chosen(sampler: TimeSampler) -> tuple[float, ...]:
    """Return the ends of the times that a configuration names; () where it names no range."""
    shift = sampler.shift if isinstance(sampler, _OnFlow | Listed) else 1.0
    draw = sampler.draw if isinstance(sampler, _OnFlow) else sampler
    if isinstance(draw, Listed):
        named = draw.times
    elif isinstance(draw, Uniform) and (draw.low, draw.high) != (0.0, 1.0):
        named = (draw.low, draw.high)
    else:
        return ()
    return tuple(shifted(torch.tensor(named, dtype=torch.float64), shift).tolist())


@dataclass(frozen=True)
class Within:
    """A time sampler conditioned on the times at which the path's network is called, by rejection.

    Attributes:
        sampler: the unconditioned sampler.
        path: its ``span`` is the condition.
    """

    sampler: TimeSampler
    path: Path

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        """Return (count,) float64 times.

        Raises:
            UserError: none of 10000 draws of some group is within.
        """
        t = self.sampler(count, generator)
        for _ in range(10000):
            within = in_span(self.path, t)
            if bool(within.all()):
                return t
            t = torch.where(within, t, self.sampler(count, generator))
        low, high = span_of(self.path)
        raise UserError(
            f"method.time draws no time from {low:g} to {high:g}, at which the expert that is trained "
            "(model.expert) is called; allowed: another shift or mean"
        )


def shifted(t: Tensor, shift: Shift) -> Tensor:
    """Return s t / (1 + (s - 1) t), shaped like ``t``; ``t`` itself for a shift of 1.

    Raises:
        UserError: the shift is "dynamic", whose factor is not known without the latents' shape.
    """
    if isinstance(shift, str):
        raise UserError(f"time.shift={shift!r} without latents; allowed here: a number")
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def table_row(u: Float[Tensor, " B"], steps: int, shift: Shift = 1.0) -> Float[Tensor, " B"]:
    """Return row floor(N u) of a flow scheduler's table, (B,) float64; u = 0 is the highest noise."""
    row = (steps - (u * steps).floor().clamp(0, steps - 1)).float() / steps
    return shifted(row, shift).double()


def _check(steps: int | None, shift: Shift) -> None:
    if steps is not None and steps < 1:
        raise UserError(f"time.steps={steps}; allowed: at least 1, or null for continuous times")
    if shift != "dynamic" and (isinstance(shift, str) or not shift > 0):
        raise UserError(f"time.shift={shift!r}; allowed: more than 0, or dynamic")


@dataclass(frozen=True)
class _OnFlow:
    """A time sampler on a flow: continuous draws, then the row of the scheduler's table."""

    draw: "Uniform | LogitNormal | Mode"
    steps: int | None
    shift: Shift

    def __call__(self, count: int, generator: Random | torch.Generator) -> Float[Tensor, " count"]:
        t = self.draw.continuous(count, generator)
        return shifted(t, self.shift) if self.steps is None else table_row(1 - t, self.steps, self.shift)


def _factor(draw: "Uniform | LogitNormal | Mode | Listed", path: Path, shape: Sequence[int]) -> float:
    model_line = path.line if isinstance(path, RectifiedFlow) else None
    return (draw.line or model_line or TokenLine()).factor(shape)


def _on(draw: "Uniform | LogitNormal | Mode", path: Path, shape: Sequence[int]) -> TimeSampler:
    shift = _factor(draw, path, shape) if draw.shift == "dynamic" else draw.shift
    return _OnFlow(draw, draw.steps, shift) if isinstance(path, RectifiedFlow) else replace(draw, shift=shift)


@dataclass(frozen=True)
class Uniform:
    """Times t ~ U[low, high); on a flow t ~ U(low, high].

    With ``steps`` N they are uniform over the integer timesteps ceil(low N) .. ceil(high N) - 1.

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
    """Times t = sigmoid(mean + std n), n ~ N(0, 1), then shifted (SD3, arXiv 2403.03206, section 3.1)."""

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
    """Times t = 1 - u - s (cos(pi u / 2)^2 - 1 + u), u ~ U[0, 1), with s the ``scale``.

    Source: SD3, arXiv 2403.03206, section 3.1. More draws lie in the middle; unlike for the logit-normal, the
    density is above 0 at the ends. SD3's ablation has s = 1.29; s = 0 is uniform. The map is monotone for
    -1 <= s <= 2 / (pi - 2).
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
    """Times drawn from a list with equal probability, for distilled models that sample in a few fixed steps.

    SDXL-Turbo's released DPO recipe is ``Listed((0.249, 0.499, 0.749, 0.999))``. The shift is applied to the
    listed times; leave it at 1 for times of a schedule that is already shifted.
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
    # round: 0.3 * 1000 may be 299.99999999999994 or 300.00000000000006, which must not add a timestep.
    return int(-(-round(value, 9) // 1))
