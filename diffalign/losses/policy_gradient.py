"""Clipped surrogates of policy gradients, and limits on the ratios of step-wise preference methods.

The ratio rho is that of two densities of one recorded step: under the policy and the policy that drew it
(PPO), or under the policy and the reference (D3PO, SPO).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def ppo(
    log_ratio: Float[Tensor, " *B"], advantage: Float[Tensor, " *B"], clip: float
) -> tuple[Float[Tensor, " *B"], Float[Tensor, " *B"]]:
    """Return max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(log_ratio), and rho.

    Source: PPO, Schulman et al. 2017, arXiv 1707.06347, equation 7. A step whose ratio has moved beyond the
    clip in the direction of its advantage has no gradient; one that has moved in the other direction keeps
    it.

    Args:
        log_ratio: (*B) log-density under the policy minus that under which the step was drawn.
        advantage: (*B), above 0 for steps that should become more likely.
        clip: half the width of the interval around 1.

    Returns:
        The losses (*B), and rho (*B).
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)), ratio


def guarded_log_ratio(
    x_s: Float[Tensor, " B *d"],
    mean: Float[Tensor, " B *d"],
    drawn_mean: Float[Tensor, " B *d"],
    std: Float[Tensor, " B *one"],
) -> Float[Tensor, " B"]:
    """Return GRPO-Guard's log-ratio of a step, (B,): the mean over the elements of z (mean - drawn_mean).

    z = (x_s - drawn_mean) / std is the noise of the draw. The result equals std (log p - log p_drawn + b)
    with b the KL of the two steps per element (Wang et al. 2025, arXiv 2510.22319): the log-ratio without its
    bias and with equal spread at all steps.

    Args:
        x_s: states after the step.
        mean: means of the policy's step, with gradient.
        drawn_mean: means of the step as it was drawn.
        std: standard deviation of both steps, above 0.
    """
    return ((x_s - drawn_mean) / std * (mean - drawn_mean)).flatten(1).mean(1)


def trusted(
    log_ratio: Float[Tensor, " B"], advantage: Float[Tensor, " B"], kl: Float[Tensor, " B"], threshold: float
) -> tuple[Float[Tensor, " B"], Tensor]:
    """Return -A rho with rho = exp(log_ratio), masked by a trust region on the KL (Flow-DPPO).

    The loss is 0, without gradient, where ``kl`` has reached the threshold and the gradient would increase
    it. Source: Ping et al. 2026, arXiv 2606.11025.

    Args:
        log_ratio: (B,) log-density under the policy minus that under which the step was drawn.
        advantage: (B,), above 0 for steps that should become more likely.
        kl: (B,) KL of the policy's step to the drawn one, without gradient.
        threshold: bound of the KL, above 0.

    Returns:
        The losses (B,), and the mask (B,) of the steps without gradient.
    """
    ratio = log_ratio.exp()
    masked = (kl >= threshold) & (advantage * (ratio.detach() - 1) > 0)
    return torch.where(masked, 0.0, -advantage * ratio), masked


def limited(log_ratio: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """Return log clip(rho, 1 - clip, 1 + clip) of rho = exp(log_ratio), (B,), 0 < clip < 1.

    Unlike with ``ppo``, a step outside the interval has no gradient in either direction.
    """
    return log_ratio.clamp(*limits(clip))


def limits(clip: float) -> tuple[float, float]:
    """Return the interval of the log-ratio, (log(1 - clip), log(1 + clip))."""
    return math.log1p(-clip), math.log1p(clip)


def kl_estimate(log_ratio: Float[Tensor, " *B"]) -> Float[Tensor, " *B"]:
    """Return exp(-d) - 1 + d of d = log p - log q, a non-negative estimate of KL(p || q) from draws of p.

    Source: Schulman 2020, "Approximating KL divergence", estimator k3, which GRPO uses.
    """
    return torch.expm1(-log_ratio) + log_ratio
