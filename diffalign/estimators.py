"""How much likelier is a sample under the policy than under the reference?

``elbo``: the evidence lower bound turns log p(x0) into minus half the denoising error at a random time, with
a constant weight over time (Wallace et al. 2023, arXiv 2311.12908, equation 14, whose T omega(lambda_t) is
folded into beta). ``transition``: the exact Gaussian log-density of a recorded sampler step (Black et al.
2023, arXiv 2305.13301).

Errors are computed in float32 whatever the autocast: rounding a half-precision reference error puts noise of
std 0.06 to 0.5 on the logit at beta 5000 before anything is learnt. Errors are means over the latent
elements, so that a beta means the same at every resolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.noising import expand
from diffalign.types import Cond, Denoiser, Likelihood, Noised, Target, Transition


@runtime_checkable
class Reduce(Protocol):
    """Squared errors (B, *d) to one number per unit, (B, *unit)."""

    def __call__(self, squared: Tensor) -> Tensor:
        """Mean over whatever makes up a unit."""
        ...


@dataclass(frozen=True)
class PerSample:
    """One unit per sample: the mean over all latent axes."""

    def __call__(self, squared: Float[Tensor, " B *d"]) -> Float[Tensor, " B"]:
        """(B,) means."""
        return squared.flatten(1).mean(1)


def regression_target(target: Target, denoiser: Denoiser, z: Noised) -> Tensor:
    """What a perfect network would predict for ``z``, (B, *d): eps, x0, alpha eps - sigma x0, or eps - x0."""
    if target == "eps":
        return z.eps
    if target == "x0":
        return z.x0
    if target == "flow":
        return z.eps - z.x0
    alpha, sigma = denoiser.path.coefficients(z.t)
    return expand(alpha, z.x0) * z.eps - expand(sigma, z.x0) * z.x0


def residual(denoiser: Denoiser, z: Noised, cond: Cond) -> Tensor:
    """What the network predicts for ``z`` minus what it should, (B, *d), in float32 (float64 if it predicts
    so).
    """
    prediction = at_least_float32(denoiser(z.x_t, z.t, cond))
    return prediction - at_least_float32(regression_target(denoiser.target, denoiser, z))


def denoising_error(denoiser: Denoiser, z: Noised, cond: Cond, reduce: Reduce) -> Tensor:
    """Mean squared error of the network on ``z``, (B, *unit), in float32 (float64 if the prediction is)."""
    return reduce(residual(denoiser, z, cond) ** 2)


def elbo(
    policy: Denoiser, reference: Denoiser, z: Noised, cond: Cond, reduce: Reduce = PerSample()
) -> Likelihood:
    """-1/2 of the denoising error of both, (B, *unit): log p(x0) up to what cancels in the ratio.

    One policy forward over all samples, with gradient, and one reference forward without.
    """
    with torch.no_grad():
        held = denoising_error(reference, z, cond, reduce)
    return Likelihood(-0.5 * denoising_error(policy, z, cond, reduce), -0.5 * held)


Kernel = Callable[[Denoiser, Tensor, Tensor, Tensor, Cond], tuple[Tensor, Tensor]]
"""(denoiser, x_t, t, s, cond) -> (mean, std) of p(x_s | x_t); ``diffalign.samplers.DDIM`` is one."""


def transition(
    policy: Denoiser, reference: Denoiser, step: Transition, cond: Cond, kernel: Kernel
) -> Likelihood:
    """Log-density of a recorded step under both, (B,): the mean over latent elements, as D3PO and DDPO
    define it.

    ``kernel`` is the one that the sampler drew from, so a density can never disagree with the step that was
    made.
    """
    with torch.no_grad():
        held = gaussian_log_density(step.x_s, *kernel(reference, step.x_t, step.t, step.s, cond))
    return Likelihood(gaussian_log_density(step.x_s, *kernel(policy, step.x_t, step.t, step.s, cond)), held)


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log N(x; mean, std) as a mean over the latent elements, (B,); ``std`` broadcasts against ``x``."""
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    log_density = (
        -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi).to(x))
    )
    return log_density.flatten(1).mean(1)


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
