"""One DDIM inversion step, explicit or implicit; each sample has its own levels s and t > s."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import expand
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.diffusion.wrapper import Wrapper
from diffalign.types import Cond, Denoiser, Path


def rows_of(denoiser: Denoiser, index: Int[Tensor, " n"], count: int) -> Denoiser:
    """Return the denoiser for rows ``index`` of ``count`` samples, with their negative conditions."""
    if not isinstance(denoiser, Guided):
        return denoiser
    negative = {
        name: v[index.to(v.device)] if len(v) == count else v for name, v in denoiser.negative.items()
    }
    return replace(denoiser, negative=negative)


@dataclass(frozen=True, eq=False)
class _FixedTime(Wrapper):
    """A denoiser whose time input is always ``time``, (B,)."""

    time: Tensor

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        return self.denoiser(x_t, self.time, cond)


def explicit_step(
    denoiser: Denoiser, x: Tensor, s: Tensor, t: Tensor, *, model_time: Tensor, cond: Cond, renoise: int = 0
) -> Tensor:
    """Return x_t (B, *d) from ``x`` at level s, by the noise estimate at ``x`` and time input ``model_time``.

    With ``renoise`` the noise is estimated again that many times at the step's own result, with the same time
    input, and the step uses the mean of all estimates (ReNoise, Garibi et al. 2024, arXiv 2403.14602).
    """
    conditioned = _FixedTime(denoiser, model_time)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = _levels(denoiser.path, x, s, t)
    # equation 12 of DDIM towards more noise: x_t = alpha_t (x_s - sigma_s eps) / alpha_s + sigma_t eps
    total = eps = clean_and_noise(conditioned, x, s, cond)[1]
    for _ in range(renoise):
        x_t = alpha_t * (x - sigma_s * eps) / alpha_s + sigma_t * eps
        eps = clean_and_noise(conditioned, x_t, t, cond)[1]
        total = total + eps
    eps = total / (renoise + 1)
    return alpha_t * (x - sigma_s * eps) / alpha_s + sigma_t * eps


def implicit_step(
    denoiser: Denoiser, x: Tensor, s: Tensor, t: Tensor, cond: Cond, *, iterations: int, tolerance: float
) -> Tensor:
    """Return the x_t (B, *d) that DDIM's step from t to s maps to ``x``, by fixed-point iterations.

    A sample's iterations end when none of its elements changes by more than ``tolerance``.
    """
    y, active = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(iterations):
        active_cond = {name: v[active.to(v.device)] for name, v in cond.items()}
        selected = rows_of(denoiser, active, len(x))
        if denoiser.target == "x0":
            prediction = clean_and_noise(selected, y[active], t[active], active_cond)[1]
        else:
            prediction = at_least_float32(selected(y[active], t[active], active_cond))
        after = _solve_for_x_t(denoiser, x[active], s[active], t[active], prediction)
        change = (after - y[active]).abs().flatten(1).amax(1)
        y[active] = after
        active = active[change > tolerance]
        if not len(active):
            break
    return y


def _solve_for_x_t(denoiser: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """Return x_t from x_s = alpha_s x0 + sigma_s eps, with (x0, eps) the estimates of ``prediction`` at x_t.

    The equation is solved with the prediction held constant in the network's own target (for x0, in the noise
    that it implies). This form has the smallest change between iterations, and does not divide by alpha_t,
    which is 0 at zero terminal SNR.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = _levels(denoiser.path, x_s, s, t)
    if denoiser.target in ("eps", "x0"):
        return alpha_t / alpha_s * x_s + (sigma_t - sigma_s * alpha_t / alpha_s) * prediction
    # v and flow: x0 and eps are linear in (x_t, prediction); solve x_s = alpha_s x0 + sigma_s eps for x_t
    term = (alpha_s * sigma_t - sigma_s * alpha_t) * prediction
    if denoiser.target == "flow":
        return (x_s + term) / (alpha_s + sigma_s)
    return (x_s + term) / (alpha_s * alpha_t + sigma_s * sigma_t)


def _levels(path: Path, x: Tensor, *times: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Return (alpha, sigma) at each of ``times``, broadcastable against ``x``."""
    return [(expand(alpha, x), expand(sigma, x)) for alpha, sigma in map(path.coefficients, times)]


def posterior_std(path: Path, s: Tensor, t: Tensor) -> Tensor:
    """Return the standard deviation (B,) of DDIM's posterior q(x_s | x_t, x0) at eta 1."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.coefficients(s), path.coefficients(t)
    return sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()
