"""Log-likelihoods of samples and of sampler steps under the policy and the reference.

``elbo``: the evidence lower bound turns log p(x0) into minus half the denoising error at a random time, with
a constant weight over time (Wallace et al. 2023, arXiv 2311.12908, equation 14, whose T omega(lambda_t) is
folded into beta). ``transition``: the exact Gaussian log-density of a recorded sampler step (Black et al.
2023, arXiv 2305.13301).

Errors are computed in float32 under any autocast: rounding a reference error to half precision adds noise of
standard deviation 0.06 to 0.5 to the initial logit at beta 5000. Errors are means over the latent elements,
so that beta has the same meaning at all resolutions.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.noising import expand
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.types import Cond, Denoiser, Kernel, Likelihood, Noised, Reduce, Target, Transition
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class PerSample:
    """Reduce to one unit per sample: the mean over all latent axes."""

    def __call__(self, squared: Float[Tensor, " B *d"]) -> Float[Tensor, " B"]:
        """Return the means, (B,)."""
        return squared.flatten(1).mean(1)


def regression_target(target: Target, denoiser: Denoiser, z: Noised) -> Tensor:
    """Return the regression target for ``z``, (B, *d): eps, x0, alpha eps - sigma x0 (v), eps - x0 (flow)."""
    if target == "eps":
        return z.eps
    if target == "x0":
        return z.x0
    if target == "flow":
        return z.eps - z.x0
    alpha, sigma = denoiser.path.coefficients(z.t)
    return expand(alpha, z.x0) * z.eps - expand(sigma, z.x0) * z.x0


def residual(denoiser: Denoiser, z: Noised, cond: Cond) -> Tensor:
    """Return the prediction for ``z`` minus its target, (B, *d), in float32 (or the prediction's float64)."""
    prediction = at_least_float32(denoiser(z.x_t, z.t, cond))
    return prediction - at_least_float32(regression_target(denoiser.target, denoiser, z))


def denoising_error(denoiser: Denoiser, z: Noised, cond: Cond, reduce: Reduce) -> Tensor:
    """Return the mean squared error on ``z``, (B, *unit), in float32 (or the prediction's float64)."""
    return reduce(residual(denoiser, z, cond) ** 2)


def elbo(
    policy: Denoiser, reference: Denoiser, z: Noised, cond: Cond, reduce: Reduce = PerSample()
) -> Likelihood:
    """Return -1/2 times the denoising errors of policy and reference, (B, *unit): an estimate of log p(x0).

    Terms that cancel in the log-ratio are left out (arXiv 2311.12908, equation 14). It makes one policy call
    over all samples, with gradient, and one reference call without.
    """
    with torch.no_grad():
        reference_error = denoising_error(reference, z, cond, reduce)
    return Likelihood(-0.5 * denoising_error(policy, z, cond, reduce), -0.5 * reference_error)


@dataclass(frozen=True)
class StepLikelihood(Likelihood):
    """Log-densities (B,) of recorded steps, and KL(policy || reference) of those steps, (B,)."""

    kl: Tensor


@dataclass(frozen=True, eq=False)
class OncePerState(Wrapper):
    """A denoiser that computes equal samples (rivals that share x_t) once.

    Attributes:
        state: (B,) int64 on the CPU; samples of one id have equal x_t, t and conditions.
    """

    state: Int[Tensor, " B"]

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the predictions of the batch, (B, *d), from one call over the distinct states."""
        _, inverse = self.state.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(inverse)).scatter_reduce(
            0, inverse, torch.arange(len(inverse)), "amin"
        )
        first, inverse = sent(first, x_t.device), sent(inverse, x_t.device)
        return self.denoiser(x_t[first], t[first], {k: v[first] for k, v in cond.items()})[inverse]


def transition(
    policy: Denoiser,
    reference: Denoiser,
    step: Transition,
    cond: Cond,
    kernel: Kernel,
    reference_mean: Tensor | None = None,
) -> StepLikelihood:
    """Return log-densities of recorded steps, (B,): means over the latent elements, as in D3PO and DDPO.

    Args:
        policy: the policy, called with gradient.
        reference: the reference, called without gradient, or not at all if ``reference_mean`` is given.
        step: the recorded steps.
        cond: conditions, every tensor (B, ...).
        kernel: the kernel that drew the steps.
        reference_mean: (B, *d) mean of the reference's step, if the rollout has recorded it.
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
    """A kernel with its own definition of the log-density of a step."""

    def log_density(self, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return the log-densities (B,) of steps to ``x`` (B, *d)."""
        ...


def log_density(kernel: Kernel, x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return the log-densities (B,) of a kernel's steps to ``x`` (B, *d).

    They are the kernel's own (``OwnDensity``) if it has one, else ``step_log_density``.
    """
    if isinstance(kernel, OwnDensity):
        return kernel.log_density(x, mean, std)
    return step_log_density(x, mean, std)


def step_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return ``gaussian_log_density``, (B,); 0 where std is 0: a deterministic step has no density."""
    drawn = std.flatten(1).amax(1) > 0
    return torch.where(drawn, gaussian_log_density(x, mean, torch.where(std > 0, std, 1)), 0)


def step_kl(mean: Tensor, reference_mean: Tensor, std: Tensor) -> Tensor:
    """Return KL(N(mean, std^2) || N(reference_mean, std^2)), (B,), a mean over the latent elements.

    It is 0 where the std is 0.
    """
    mean, reference_mean, std = (at_least_float32(v) for v in (mean, reference_mean, std))
    # equal variances: KL = (mean - reference_mean)^2 / (2 std^2) per element
    squared = (mean - reference_mean) ** 2 / (2 * torch.where(std > 0, std, 1) ** 2)
    return torch.where(std > 0, squared, 0).flatten(1).mean(1)


def gaussian_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x; mean, std^2) as a mean over the latent elements, (B,); ``std`` broadcasts to ``x``."""
    x, mean, std = at_least_float32(x), at_least_float32(mean), at_least_float32(std)
    log_density = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def at_least_float32(x: Tensor) -> Tensor:
    """Return ``x`` in float32; float64 is kept."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class PerFrame:
    """Reduce to one unit per latent frame of a video: the mean over channels, height and width."""

    def __call__(self, squared: Float[Tensor, " B *d"]) -> Float[Tensor, "B F"]:
        """Return the means, (B, F).

        Raises:
            UserError: the latents have no frame axis (images).
        """
        if squared.ndim != 5:
            raise UserError(
                f"latents of shape {tuple(squared.shape)} have no frames; allowed: videos, (B, C, F, h, w)"
            )
        return squared.mean((1, 3, 4))
