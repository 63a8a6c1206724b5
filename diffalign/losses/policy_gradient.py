"""The clipped surrogate of policy gradients, and the limit that step-wise preference methods put on ratios.

Both are about the ratio rho of two densities of one recorded step: of the policy and whoever drew it (PPO),
or of the policy and the reference (D3PO, SPO).
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


def limited(log_ratio: Float[Tensor, " B"], clip: float) -> Float[Tensor, " B"]:
    """log clip(rho, 1 - clip, 1 + clip) of rho = exp(log_ratio), (B,), 0 < clip < 1; no gradient outside.

    Unlike ``ppo`` a step outside loses its gradient whichever way it should go.
    """
    return log_ratio.clamp(*limits(clip))


def limits(clip: float) -> tuple[float, float]:
    """Return the interval of the log-ratio, (log(1 - clip), log(1 + clip))."""
    return math.log1p(-clip), math.log1p(clip)
