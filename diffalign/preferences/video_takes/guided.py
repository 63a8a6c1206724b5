"""From a clip's latents to another take of it: partial noising, then the model's own deterministic sampler.

DenseDPO's algorithm 2 prints the sampler's step as x <- x + v dt, although its v regresses eps - x0; noise is
taken away by x <- x - v dt, which is what is done here. On a rectified flow that is Euler's method, on a
variance-preserving path DDIM.
"""

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.samplers import DDIM, clean_and_noise
from diffalign.types import Cond, Denoiser


def steps_left(eta: float, steps: int) -> int:
    """n = round(eta N), at least 1: how many of a sampler's N steps denoise what was noised to eta."""
    return max(1, round(eta * steps))


def even_times(eta: float, steps: int) -> Float[Tensor, " n"]:
    """(n + 1,) descending float64 times n / N, ..., 1 / N, 0: the paper's, which knows no timestep shift."""
    return torch.arange(steps_left(eta, steps), -1, -1, dtype=torch.float64) / steps


def model_times(eta: float, steps: int, grid: Callable[[int], Float[Tensor, " S"]]) -> Float[Tensor, " n"]:
    """(n + 1,) the last n steps of the model's own grid of N, shift included: under a shift they start at a
    time above eta.
    """
    return grid(steps)[-steps_left(eta, steps) - 1 :]


def noised(
    denoiser: Denoiser, x0: Float[Tensor, " B *d"], eps: Float[Tensor, " B *d"], times: Float[Tensor, " S"]
) -> Float[Tensor, " B *d"]:
    """Return the states that takes of ``x0`` start from: alpha x0 + sigma eps at ``times[0]``."""
    return add_noise(denoiser, x0, eps, _at(times[0], x0))


@torch.no_grad()
def denoised(
    denoiser: Denoiser, x: Float[Tensor, " B *d"], times: Float[Tensor, " S"], cond: Cond
) -> Float[Tensor, " B *d"]:
    """Clean latents of states ``x`` at ``times[0]``, by the deterministic steps down ``times`` (ended by 0).

    The last step is the network's clean estimate at the last noisy time: Euler's step to 0 on a flow, and on
    a variance-preserving path the sample without what noise its first training step still holds.
    """
    kernel = DDIM()
    for now, then in itertools.pairwise(times[:-1]):
        x = kernel(denoiser, x, _at(now, x), _at(then, x), cond)[0].to(x.dtype)
    return clean_and_noise(denoiser, x, _at(times[-2], x), cond)[0].to(x.dtype)


def _at(time: Tensor, x: Tensor) -> Tensor:
    """Return the same time for every sample, (B,), in x's precision."""
    return torch.full((len(x),), float(time), device=x.device, dtype=torch.float64).to(x.dtype)
