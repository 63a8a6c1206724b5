"""One step from less to more noise, explicit or exact, of samples that each have their own two levels."""

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
    """Return the denoiser for some of the ``count`` samples: guidance has a negative condition for each."""
    if not isinstance(denoiser, Guided):
        return denoiser
    negative = {
        name: v[index.to(v.device)] if len(v) == count else v for name, v in denoiser.negative.items()
    }
    return replace(denoiser, negative=negative)


@dataclass(frozen=True, eq=False)
class _Told(Wrapper):
    """A denoiser whose network is told ``time``, whatever the level of its input."""

    time: Tensor

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        return self.denoiser(x_t, self.time, cond)


def explicit_step(
    denoiser: Denoiser, x: Tensor, s: Tensor, t: Tensor, *, told: Tensor, cond: Cond, renoise: int = 0
) -> Tensor:
    """Return ``x`` (B, *d) of level s to level t > s by the noise estimate at ``x``, the network told
    ``told``.

    With ``renoise`` the step is made again that often from where it has led, told the same time, and takes
    the mean of all noise estimates (ReNoise, Garibi et al. 2024, arXiv 2403.14602).
    """
    conditioned = _Told(denoiser, told)
    (alpha_s, sigma_s), (alpha_t, sigma_t) = _levels(denoiser.path, x, s, t)
    total = eps = clean_and_noise(conditioned, x, s, cond)[1]
    for _ in range(renoise):
        there = alpha_t * (x - sigma_s * eps) / alpha_s + sigma_t * eps
        eps = clean_and_noise(conditioned, there, t, cond)[1]
        total = total + eps
    eps = total / (renoise + 1)
    return alpha_t * (x - sigma_s * eps) / alpha_s + sigma_t * eps


def implicit_step(
    denoiser: Denoiser, x: Tensor, s: Tensor, t: Tensor, cond: Cond, *, iterations: int, tolerance: float
) -> Tensor:
    """Return the x_t (B, *d) that DDIM's step from t to s takes to ``x``, by fixed-point iterations from
    ``x``.

    A sample's iterations end when no element of it moves by more than ``tolerance``.
    """
    y, going = x.clone(), torch.arange(len(x), device=x.device)
    for _ in range(iterations):
        some = {name: v[going.to(v.device)] for name, v in cond.items()}
        selected = rows_of(denoiser, going, len(x))
        if denoiser.target == "x0":
            prediction = clean_and_noise(selected, y[going], t[going], some)[1]
        else:
            prediction = at_least_float32(selected(y[going], t[going], some))
        after = _undone(denoiser, x[going], s[going], t[going], prediction)
        moved = (after - y[going]).abs().flatten(1).amax(1)
        y[going] = after
        going = going[moved > tolerance]
        if not len(going):
            break
    return y


def _undone(denoiser: Denoiser, x_s: Tensor, s: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """x_t from x_s = alpha_s x0 + sigma_s eps, where (x0, eps) is what ``prediction`` at x_t says.

    Solved with the prediction held, in the form that the network predicts (the noise that it implies, for
    x0): so held, it moves least from one iterate to the next, and nothing divides by alpha_t, which is 0 at
    zero terminal SNR.
    """
    (alpha_s, sigma_s), (alpha_t, sigma_t) = _levels(denoiser.path, x_s, s, t)
    if denoiser.target in ("eps", "x0"):
        return alpha_t / alpha_s * x_s + (sigma_t - sigma_s * alpha_t / alpha_s) * prediction
    turn = (alpha_s * sigma_t - sigma_s * alpha_t) * prediction
    if denoiser.target == "flow":
        return (x_s + turn) / (alpha_s + sigma_s)
    return (x_s + turn) / (alpha_s * alpha_t + sigma_s * sigma_t)


def _levels(path: Path, x: Tensor, *times: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
    """Return (alpha, sigma) at each of ``times``, shaped to multiply ``x``."""
    return [(expand(alpha, x), expand(sigma, x)) for alpha, sigma in map(path.coefficients, times)]


def posterior_std(path: Path, s: Tensor, t: Tensor) -> Tensor:
    """Std (B,) of DDIM's posterior q(x_s | x_t, x0) at eta 1."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = path.coefficients(s), path.coefficients(t)
    return sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).clamp(min=0).sqrt()
