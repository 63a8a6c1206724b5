"""The clipped surrogate of policy gradients, and the limit that step-wise preference methods put on ratios.

Both are about the ratio rho of two densities of one recorded step: of the policy and the policy that drew
it (PPO), or of the policy and the reference (D3PO, SPO).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def ppo(
    log_ratio: Float[Tensor, " *B"], advantage: Float[Tensor, " *B"], clip: float
) -> tuple[Float[Tensor, " *B"], Float[Tensor, " *B"]]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(log_ratio) (Schulman et al. 2017, arXiv
    1707.06347, equation 7).

    A step that has already moved further than the clip in the direction of its advantage has no gradient;
    one that has moved the wrong way keeps it.

    Args:
        log_ratio: (*B) log-density under the policy minus that under which the step was drawn.
        advantage: (*B), above 0 for what should become likelier.
        clip: half the width of the interval round 1.

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

    z = (x_s - drawn_mean) / std is the noise that was drawn. It is std (log p - log p_drawn + b) with b the
    KL of the two steps per element (Wang et al. 2025, arXiv 2510.22319): the log-ratio without its bias, in a
    unit that is the same at all steps.

    Args:
        x_s: where the step went.
        mean: of the policy's step.
        drawn_mean: of the step as it was drawn.
        std: of both, above 0.
    """
    return ((x_s - drawn_mean) / std * (mean - drawn_mean)).flatten(1).mean(1)


def trusted(
    log_ratio: Float[Tensor, " B"], advantage: Float[Tensor, " B"], kl: Float[Tensor, " B"], threshold: float
) -> tuple[Float[Tensor, " B"], Tensor]:
    """Return -A rho with rho = exp(log_ratio), and 0, without gradient, where ``kl`` has reached the
    threshold and the step would move further (Flow-DPPO, Ping et al. 2026, arXiv 2606.11025).

    Args:
        log_ratio: (B,) log-density under the policy minus that under which the step was drawn.
        advantage: (B,), above 0 for what should become likelier.
        kl: (B,) divergence of the policy's step from the drawn one, without gradient.
        threshold: of the divergence.

    Returns:
        The losses (B,), and (B,) booleans, which steps are masked.
    """
    ratio = log_ratio.exp()
    masked = (kl >= threshold) & (advantage * (ratio.detach() - 1) > 0)
    return torch.where(masked, 0.0, -advantage * ratio), masked


def limited(log_ratio: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """log clip(rho, 1 - clip, 1 + clip) of rho = exp(log_ratio), (B,), 0 < clip < 1; no gradient outside.

    Unlike ``ppo`` a step outside loses its gradient whichever way it should go.
    """
    return log_ratio.clamp(*limits(clip))


def limits(clip: float) -> tuple[float, float]:
    """Return the interval of the log-ratio, (log(1 - clip), log(1 + clip))."""
    return math.log1p(-clip), math.log1p(clip)


def kl_estimate(log_ratio: Float[Tensor, " *B"]) -> Float[Tensor, " *B"]:
    """exp(-d) - 1 + d of d = log p - log q: an estimate of KL(p || q) from draws of p that is never negative
    (Schulman 2020, "Approximating KL divergence", its third one; GRPO's).
    """
    return torch.expm1(-log_ratio) + log_ratio
