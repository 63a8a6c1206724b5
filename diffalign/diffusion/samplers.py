"""Transition kernels of samplers, and a loop that samples with them.

DDIM with noise (Song et al. 2020, arXiv 2010.02502, equations 12 and 16) in terms of a path's alpha and
sigma: with eta = 0 it is the deterministic step of any path (for rectified flow, the Euler step of its ODE);
with eta = 1 on a variance-preserving path it is ancestral sampling. ``FlowSDE`` is the SDE step for flow
models (Flow-GRPO, Liu et al. 2025, arXiv 2505.05470, section 4.2). ``likelihood.transition`` scores steps
with the kernel that drew them.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.likelihood import at_least_float32, log_density, step_log_density
from diffalign.diffusion.noising import expand
from diffalign.diffusion.paths import EDM, RectifiedFlow, VariancePreserving
from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError, unknown
from diffalign.types import Cond, Denoiser, Path, Random, Transition
from diffalign.utils.transfer import sent


def clean_and_noise(
    denoiser: Denoiser, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond
) -> tuple[Tensor, Tensor]:
    """Return the network's estimates (x0, eps) at ``x_t``, each (B, *d) float32, for any target."""
    return estimates_of(denoiser, denoiser(x_t, t, cond), x_t, t)


def estimates_of(
    denoiser: Denoiser, prediction: Tensor, x_t: Tensor, t: Float[Tensor, " B"]
) -> tuple[Tensor, Tensor]:
    """Return the estimates (x0, eps), each (B, *d) float32, that a ``prediction`` at ``x_t`` implies."""
    prediction = at_least_float32(prediction)
    alpha, sigma = (expand(c, x_t) for c in denoiser.path.coefficients(t))
    x_t = at_least_float32(x_t)
    if denoiser.target == "eps":
        return (x_t - sigma * prediction) / alpha, prediction
    if denoiser.target == "x0":
        return prediction, (x_t - alpha * prediction) / sigma
    if denoiser.target == "flow":
        return x_t - sigma * prediction, x_t + alpha * prediction
    return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction


@runtime_checkable
class StepKernel(Protocol):
    """A kernel of this module: a ``types.Kernel`` that also accepts given estimates (``after``)."""

    @property
    def draws(self) -> bool:
        """Whether steps are stochastic, and so have a density."""
        ...

    def __call__(
        self, denoiser: Denoiser, x_t: Tensor, t: Float[Tensor, " B"], s: Float[Tensor, " B"], cond: Cond
    ) -> tuple[Tensor, Tensor]:
        """Return (mean (B, *d), std (B, 1, ...)) of the step from t to s < t; see ``after``."""
        return self.after(denoiser.path, *clean_and_noise(denoiser, x_t, t, cond), t, s)

    def after(
        self, path: Path, x0: Tensor, eps: Tensor, t: Float[Tensor, " B"], s: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        """Return (mean, std) of the step from given estimates (x0, eps) of the state at ``t``."""
        ...


@dataclass(frozen=True)
class DDIM(StepKernel):
    """DDIM's step (arXiv 2010.02502, equations 12 and 16).

        p(x_s | x_t) = N(alpha_s x0 + sqrt(sigma_s^2 - std^2) eps, std^2),
        std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2).

    Attributes:
        eta: noise of the step, 0 (deterministic, any path) to 1 (ancestral); above 0 the path must be
            variance-preserving.
    """

    eta: float = 0.0

    @property
    def draws(self) -> bool:
        """Whether eta is above 0."""
        return self.eta > 0

    def after(
        self, path: Path, x0: Tensor, eps: Tensor, t: Float[Tensor, " B"], s: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        """Return (mean, std) of the step from given estimates (x0, eps) of the state at ``t``.

        Raises:
            UserError: eta > 0 on a path that is not variance-preserving.
        """
        if self.eta and not isinstance(path, VariancePreserving | EDM):
            raise UserError(f"sampler eta={self.eta} on {type(path).__name__}; allowed there: eta = 0")
        alpha_t, sigma_t = (expand(c, x0) for c in path.coefficients(t))
        alpha_s, sigma_s = (expand(c, x0) for c in path.coefficients(s))
        # equation 16: std = eta sigma_s / sigma_t sqrt(1 - alpha_t^2 / alpha_s^2)
        std = torch.zeros_like(sigma_s)
        if self.eta:
            std = self.eta * ((sigma_s / sigma_t) ** 2 * (1 - (alpha_t / alpha_s) ** 2)).clamp(min=0).sqrt()
        return alpha_s * x0 + (sigma_s**2 - std**2).clamp(min=0).sqrt() * eps, std


@dataclass(frozen=True)
class Ancestral(StepKernel):
    """The posterior step q(x_s | x_t, x0) of the path's Markov chain, at the network's estimate of x0:

        std = sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2),
        mean = alpha_s x0 + alpha_t sigma_s^2 / (alpha_s sigma_t) eps.

    On a variance-preserving path it is DDIM with eta = 1. On every path it is the memoryless schedule of
    Adjoint Matching (Domingo-Enrich et al. 2024, arXiv 2409.08861, section 4.3): on a flow std^2 / (t - s)
    tends to the paper's 2 t / (1 - t) for short steps, and the result of a step from pure noise is
    independent of that noise.
    """

    @property
    def draws(self) -> bool:
        """True: steps are stochastic, except the step to time 0 of a flow."""
        return True

    def after(
        self, path: Path, x0: Tensor, eps: Tensor, t: Float[Tensor, " B"], s: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        """Return (mean, std) of the step from given estimates (x0, eps) of the state at ``t``."""
        alpha_t, sigma_t = (expand(c, x0) for c in path.coefficients(t))
        alpha_s, sigma_s = (expand(c, x0) for c in path.coefficients(s))
        carried = alpha_t * sigma_s / alpha_s
        std = sigma_s / sigma_t * (sigma_t**2 - carried**2).clamp(min=0).sqrt()
        return alpha_s * x0 + carried * sigma_s / sigma_t * eps, std


FlowForm = Literal["sde", "cps", "dance"]
FlowDensity = Literal["gaussian", "squared"]


@dataclass(frozen=True)
class FlowSDE(StepKernel):
    """The stochastic step of a rectified flow, of an SDE with the marginals of its ODE.

    With g = level sqrt(t / (1 - t)) the SDE's mean x + (v + g^2 / (2 t) (x + (1 - t) v)) (s - t) (Flow-GRPO,
    arXiv 2505.05470, section 4.2), written with the network's estimates, gives

        p(x_s | x_t) = N((1 - s) x0 + (s - level^2 (t - s) / (2 (1 - t))) eps, g^2 (t - s)).

    At t = 1 the denominator 1 - t is replaced by 1 - s, as in the released code. A step to 0 is stochastic.

    ``form`` "dance" (DanceGRPO, Xue et al. 2025, arXiv 2505.07818) is the same step with a constant g =
    level.

    ``form`` "cps" (coefficients-preserving, Flow-GRPO's later step) keeps the path's amount of noise exactly:
    std = s sin(level pi / 2) and mean (1 - s) x0 + sqrt(s^2 - std^2) eps for any length of the step, so more
    steps add more noise. Its released log-density is minus the mean squared error, mean (x_s - mean)^2 over
    the elements: ``density`` "squared" here (DDRL has it for all steps, arXiv 2512.04332). Log-ratios are
    then smaller by the factor 2 std^2, and so is a suitable clip.

    Attributes:
        level: amount of noise, at least 0: 0 is the ODE, 0.7 the published value; at most 1 in form "cps"; in
            form "dance" 0.3 for images and 0.25 for videos.
        form: formula of the step: "sde", "cps" or "dance".
        density: definition of a step's log-density: "gaussian", or "squared", minus the mean squared error.
    """

    level: float = 0.7
    form: FlowForm = "sde"
    density: FlowDensity = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.level <= (1 if self.form == "cps" else math.inf):
            allowed = "0 to 1" if self.form == "cps" else "0 or more"
            raise UserError(f"sampler level={self.level} in form {self.form}; allowed: {allowed}")

    @property
    def draws(self) -> bool:
        """Whether the level is above 0."""
        return self.level > 0

    def after(
        self, path: Path, x0: Tensor, eps: Tensor, t: Float[Tensor, " B"], s: Float[Tensor, " B"]
    ) -> tuple[Tensor, Tensor]:
        """Return (mean, std) of the step from given estimates (x0, eps) of the state at ``t``.

        Raises:
            UserError: the path is not a rectified flow.
        """
        if not isinstance(path, RectifiedFlow):
            raise UserError(f"sampler FlowSDE on {type(path).__name__}; allowed there: DDIM")
        t, s = expand(t, x0), expand(s, x0)
        if self.form == "cps":
            # std = s sin(angle) and sqrt(s^2 - std^2) = s cos(angle)
            angle = self.level * math.pi / 2
            return (1 - s) * x0 + s * math.cos(angle) * eps, s * math.sin(angle)
        # g^2, with 1 - s in place of 1 - t at t = 1
        drift = self.level**2 * (1 if self.form == "dance" else t / (1 - torch.where(t == 1, s, t)))
        noise = s - drift * (t - s) / (2 * t)
        return (1 - s) * x0 + noise * eps, (drift * (t - s)).sqrt()

    def log_density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the log-density of steps to ``x`` (B, *d) by ``density``, (B,); 0 where std is 0."""
        if self.density == "gaussian":
            return step_log_density(x, mean, std)
        squared = (at_least_float32(x) - at_least_float32(mean)) ** 2
        return torch.where(std > 0, -squared, 0).flatten(1).mean(1)

    def length(self, t: Float[Tensor, " B"], s: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return the step's variance (B,) divided by the squared std that Flow-GRPO divides its KL by.

        It is t - s for an SDE and 1 in form "cps".
        """
        return torch.ones_like(t) if self.form == "cps" else t - s


def kernel_for(
    path: Path, eta: float, form: FlowForm = "sde", density: FlowDensity = "gaussian"
) -> StepKernel:
    """Return the kernel with noise ``eta`` on a path.

    On a flow it is ``FlowSDE`` with ``eta`` as its level, on other paths DDIM; with eta 0 always DDIM.

    Raises:
        UserError: a level outside the form's range, or a ``form`` or ``density`` on a path that is not a
            flow.
    """
    if isinstance(path, RectifiedFlow):
        return FlowSDE(eta, form, density) if eta else DDIM()
    if density != "gaussian":
        raise UserError(f"rollout.density={density!r} on {type(path).__name__}; allowed there: gaussian")
    if form != "sde":
        raise UserError(f"rollout.form={form!r} on {type(path).__name__}; allowed there: sde")
    return DDIM(eta)


def grid_of(path: Path, steps: int) -> Float[Tensor, " S"]:
    """Return (steps + 1,) descending float64 times: DDIM's leading grid; for flows and EDM, even ones."""
    if isinstance(path, VariancePreserving):
        return timesteps(steps, path.steps)
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def timesteps(steps: int, train_steps: int = 1000, spacing: str = "leading") -> Float[Tensor, " S"]:
    """Return (steps + 1,) descending float64 times of a DDIM grid that ends at 0.

    For 20 steps of 1000 the timesteps are: "leading" (offset 1, SD pipelines and D3PO) 951, 901, ..., 51, 1,
    0; "trailing", needed by models whose last step is pure noise (Lin et al. 2023, arXiv 2305.08891), 999,
    949, ..., 49, 0; "linspace", as in DPM-Solver, 999, 949, ..., 50, 0 (DDIM's own would end with a step from
    0 to 0, which changes nothing and has no density).

    Raises:
        UserError: ``steps`` is out of range, or the spacing is unknown.
    """
    if not 1 <= steps <= train_steps:
        raise UserError(f"sampling steps={steps}; allowed: 1 to {train_steps}")
    count = torch.arange(steps, dtype=torch.float64)
    if spacing == "linspace":
        even = torch.linspace(0, train_steps - 1, steps + 1, dtype=torch.float64)
        return even.round().flip(0) / train_steps
    if spacing == "trailing":
        grid = (train_steps - count * train_steps / steps).round() - 1
    elif spacing == "leading":
        grid = count.flip(0) * (train_steps // steps) + 1
    else:
        raise unknown("timestep_spacing of the scheduler", spacing, ["leading", "trailing", "linspace"])
    return torch.cat([grid, torch.zeros(1, dtype=torch.float64)]) / train_steps


def trajectory(
    denoiser: Denoiser,
    kernel: StepKernel,
    x: Tensor,
    times: Sequence[float] | Tensor,
    cond: Cond,
    generator: Random | torch.Generator,
) -> list[Transition]:
    """Sample from pure noise ``x`` (B, *d) along descending ``times``; return all steps with log-densities.

    A step of std 0 is deterministic and has no density: its ``logp`` is 0.
    """
    steps = []
    grid = torch.as_tensor(times, dtype=torch.float64)
    for time, next_time in itertools.pairwise(grid):
        t, s = (
            torch.full((len(x),), float(v), device=x.device, dtype=torch.float64).to(x.dtype)
            for v in (time, next_time)
        )
        mean, std = kernel(denoiser, x, t, s, cond)
        after, logp = mean, mean.new_zeros(len(x))
        if kernel.draws:
            after = mean + std * sent(normal(generator, len(x), tuple(x.shape[1:])), mean)
            logp = log_density(kernel, after, mean, std)
        steps.append(Transition(x, after.to(x.dtype), t, s, logp))
        x = steps[-1].x_s
    return steps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    x: Tensor,
    cond: Cond,
    generator: Random | torch.Generator,
    steps: int = 50,
    eta: float = 0.0,
) -> Tensor:
    """Return clean samples (B, *d) from noise ``x``: the network's x0 estimate at the last noisy state.

    The states follow ``grid_of``. Its last time, training step 0, still has noise of std sigma(0), which the
    estimate removes.
    """
    path = denoiser.path
    last = trajectory(denoiser, kernel_for(path, eta), x, grid_of(path, steps)[:-1], cond, generator)[-1]
    return clean_and_noise(denoiser, last.x_s, last.s, cond)[0].to(x.dtype)
