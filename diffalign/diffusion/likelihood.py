"""How much likelier is a sample under the policy than under the reference?

``elbo``: the evidence lower bound turns log p(x0) into minus half the denoising error at a random time, with
a constant weight over time (Wallace et al. 2023, arXiv 2311.12908, equation 14, whose T omega(lambda_t) is
folded into beta). ``transition``: the exact Gaussian log-density of a recorded sampler step (Black et al.
2023, arXiv 2305.13301).

Errors are computed in float32 whatever the autocast: rounding a half-precision reference error puts noise of
std 0.06 to 0.5 on the logit at beta 5000 before anything is learnt. Errors are means over the latent
elements, so that a beta means the same at every resolution.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.noising import expand
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.types import Cond, Denoiser, Kernel, Likelihood, Noised, Reduce, Target, Transition


@dataclass(frozen=True)
class PerSample:
    """One unit per sample: the mean over all latent axes."""

    def __call__(self, squared: Float[Tensor, " B *d"]) -> Float[Tensor, " B"]:
        """Return (B,) means."""
        return squared.flatten(1).mean(1)


def regression_target(target: Target, denoiser: Denoiser, z: Noised) -> Tensor:
    """Return a perfect prediction for ``z``, (B, *d): eps, x0, alpha eps - sigma x0, or eps - x0."""
    if target == "eps":
        return z.eps
    if target == "x0":
        return z.x0
    if target == "flow":
        return z.eps - z.x0
    alpha, sigma = denoiser.path.coefficients(z.t)
    return expand(alpha, z.x0) * z.eps - expand(sigma, z.x0) * z.x0


def residual(denoiser: Denoiser, z: Noised, cond: Cond) -> Tensor:
    """Return the prediction for ``z`` minus its target, (B, *d), in float32 (float64 if it predicts so)."""
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


@dataclass(frozen=True)
class StepLikelihood(Likelihood):
    """Log-densities (B,) of recorded steps, and KL(policy || reference) of those steps, (B,)."""

    kl: Tensor


@dataclass(frozen=True, eq=False)
class OncePerState(Wrapper):
    """A denoiser that makes one forward for equal samples: rivals that share x_t.

    Attributes:
        state: (B,) int64 on the CPU; equal ids have equal x_t, t and conditions.
    """

    state: Int[Tensor, " B"]

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the prediction for all B, (B, *d), of one call for each different state."""
        _, inverse = self.state.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(inverse)).scatter_reduce(
            0, inverse, torch.arange(len(inverse)), "amin"
        )
        first, inverse = first.to(x_t.device), inverse.to(x_t.device)
        return self.denoiser(x_t[first], t[first], {k: v[first] for k, v in cond.items()})[inverse]


def transition(
    policy: Denoiser,
    reference: Denoiser,
    step: Transition,
    cond: Cond,
    kernel: Kernel,
    reference_mean: Tensor | None = None,
) -> StepLikelihood:
    """Log-density of recorded steps under both, (B,): means over the latent elements, as in D3PO and DDPO.

    Args:
        policy: called with gradient.
        reference: called without gradient, and not at all where its mean is known.
        step: what was drawn.
        cond: conditions, every tensor (B, ...).
        kernel: the one that drew, so that a density can never disagree with the step that was made.
        reference_mean: (B, *d) where the reference would have gone, known from the rollout.
    """
    if reference_mean is None:
        with torch.no_grad():
            reference_mean, _ = kernel(reference, step.x_t, step.t, step.s, cond)
    mean, std = kernel(policy, step.x_t, step.t, step.s, cond)
    return StepLikelihood(
        log_density(kernel, step.x_s, mean, std),
        log_density(kernel, step.x_s, reference_mean, std),
        step_kl(mean, reference_mean, std),
    )


@runtime_checkable
class OwnDensity(Protocol):
    """A kernel that says itself what stands for the log-density of its steps."""

    def log_density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return (B,) of steps to ``x`` (B, *d)."""
        ...


def log_density(kernel: Kernel, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return what stands for the log-density of a kernel's steps to ``x`` (B, *d), (B,): the kernel's own
    where it has one, else ``step_log_density``.
    """
    if isinstance(kernel, OwnDensity):
        return kernel.log_density(x, mean, std)
    return step_log_density(x, mean, std)


def step_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``gaussian_log_density``, and 0 where the std is 0: a step without noise is no draw and has no
    density.
    """
    drawn = std.flatten(1).amax(1) > 0
    return torch.where(drawn, gaussian_log_density(x, mean, torch.where(std > 0, std, 1)), 0)


def step_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) to N(reference_mean, std^2), (B,), a mean over the latent elements; 0 where the
    std is 0.
    """
    mean, reference_mean, std = (at_least_float32(v) for v in (mean, reference_mean, std))
    squared = (mean - reference_mean) ** 2 / (2 * torch.where(std > 0, std, 1) ** 2)
    return torch.where(std > 0, squared, 0).flatten(1).mean(1)


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log N(x; mean, std) as a mean over the latent elements, (B,); ``std`` broadcasts against ``x``."""
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    log_density = (
        -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi).to(x))
    )
    return log_density.flatten(1).mean(1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class PerFrame:
    """One unit per latent frame of a video: the mean over channels, height and width."""

    def __call__(self, squared: Float[Tensor, " B *d"]) -> Float[Tensor, "B F"]:
        """Return (B, F) means.

        Raises:
            UserError: images, which have no frame axis.
        """
        if squared.ndim != 5:
            raise UserError(
                f"latents of shape {tuple(squared.shape)} have no frames; allowed: videos, (B, C, F, h, w)"
            )
        return squared.mean((1, 3, 4))
