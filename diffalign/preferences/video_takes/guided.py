"""Make a take of a clip: noise its latents partially, then denoise with the model's deterministic sampler.

DenseDPO's algorithm 2 prints the sampler's step as x <- x + v dt, although its v regresses eps - x0. Noise is
removed by x <- x - v dt, which is used here: Euler's method on a rectified flow, DDIM on a
variance-preserving path.
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
    """Return n = round(eta N), at least 1: the number of a sampler's N steps from noise level eta to 0."""
    return max(1, round(eta * steps))


def even_times(eta: float, steps: int) -> Float[Tensor, " n"]:
    """Return times (n + 1,), float64: n / N, ..., 1 / N, 0, as in the paper, without a timestep shift."""
    return torch.arange(steps_left(eta, steps), -1, -1, dtype=torch.float64) / steps


def model_times(eta: float, steps: int, grid: Callable[[int], Float[Tensor, " S"]]) -> Float[Tensor, " n"]:
    """Return times (n + 1,) of the last n steps of the model's own grid of N steps, timestep shift included.

    With a shift they start at a time above eta.
    """
    return grid(steps)[-steps_left(eta, steps) - 1 :]


def noised(
    denoiser: Denoiser, x0: Float[Tensor, " B *d"], eps: Float[Tensor, " B *d"], times: Float[Tensor, " S"]
) -> Float[Tensor, " B *d"]:
    """Return the initial states of takes of ``x0``: alpha x0 + sigma eps at ``times[0]``."""
    return add_noise(denoiser, x0, eps, _at(times[0], x0))


@torch.no_grad()
def denoised(
    denoiser: Denoiser, x: Float[Tensor, " B *d"], times: Float[Tensor, " S"], cond: Cond
) -> Float[Tensor, " B *d"]:
    """Denoise states ``x`` from ``times[0]`` to 0 by deterministic steps along ``times``, which ends with 0.

    The last step returns the network's clean estimate at the last noisy time. On a flow this equals Euler's
    step to 0; on a variance-preserving path it also removes the noise of the first training timestep.
    """
    kernel = DDIM()
    for now, then in itertools.pairwise(times[:-1]):
        x = kernel(denoiser, x, _at(now, x), _at(then, x), cond)[0].to(x.dtype)
    return clean_and_noise(denoiser, x, _at(times[-2], x), cond)[0].to(x.dtype)


def _at(time: Tensor, x: Tensor) -> Tensor:
    """Return one time for every sample, (B,), in the dtype of ``x``."""
    return torch.full((len(x),), float(time), device=x.device, dtype=torch.float64).to(x.dtype)
