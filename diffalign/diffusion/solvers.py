"""DPM-Solver++(2M), a second-order solver that needs half as many steps as DDIM, with times per sample.

Lu et al. 2022, arXiv 2211.01095, Algorithm 2. With D the network's estimate of x0, lambda = log(alpha /
sigma) and h = lambda_s - lambda_t, the step from t to s is

    x_s = (sigma_s / sigma_t) x_t - alpha_s (exp(-h) - 1) (D_t + (D_t - D_u) h / (2 h_before)),

with u the time before t and h_before = lambda_t - lambda_u; the first step has D_t only. Times must lie
strictly between 0 and 1, on any path. diffusers' scheduler uses one row of its table for a whole batch; here
each sample has its own times, so that the times of a rollout can be perturbed per sample.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.noising import expand
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.types import Cond, Denoiser, Noised, Path
from diffalign.utils.transfer import sent


def dpm_solver_step(
    path: Path, now: Noised, s: Float[Tensor, " B"], before: Noised | None = None
) -> Float[Tensor, " B *d"]:
    """Return x_s, (B, *d), of the step from ``now.t`` to s < now.t (arXiv 2211.01095, Algorithm 2).

    Args:
        path: the noising path, which has alpha and sigma.
        now: the state; its ``x0`` is the network's estimate.
        s: (B,) times after the step.
        before: the state one step earlier; None makes a first-order step.
    """
    alpha_t, sigma_t, log_t = _at(path, now.t, now.x_t)
    alpha_s, sigma_s, log_s = _at(path, s, now.x_t)
    clean = now.x0
    if before is not None:  # D_t + (D_t - D_u) h / (2 h_before)
        _, _, log_u = _at(path, before.t, now.x_t)
        clean = clean + (clean - before.x0) * (log_s - log_t) / (2 * (log_t - log_u))
    shrink = sigma_s * alpha_t / (sigma_t * alpha_s)  # exp(-h)
    return sigma_s / sigma_t * now.x_t - alpha_s * (shrink - 1) * clean


@torch.no_grad()
def dpm_solver(
    denoiser: Denoiser,
    x: Float[Tensor, " B *d"],
    times: Float[Tensor, " S B"],
    stop: Int[Tensor, " B"],
    cond: Cond,
) -> Noised:
    """Solve the ODE for each sample to its own last time, without gradient.

    A sample that has reached its last time takes part in no further network call.

    Args:
        denoiser: the network.
        x: noise at each sample's first time.
        times: descending along S; column b holds the times of sample b.
        stop: (B,) row of ``times`` at which a sample stops, on the CPU; later rows are not read.
        cond: conditions, every tensor (B, ...).

    Returns:
        The last states ``x_t`` at ``t``, with the network's estimates of ``x0`` and ``eps`` at them.
    """
    path, before, active = denoiser.path, None, torch.arange(len(x))
    finished: list[tuple[Tensor, Noised]] = []
    for row in range(int(stop.max()) + 1):
        t = times[row, sent(active, times.device)]
        now = Noised(*clean_and_noise(denoiser, x, t, _rows(cond, active)), x, t)
        last = stop[active] == row
        finished.append((active[last], _pick(now, last)))
        active, now = active[~last], _pick(now, ~last)
        if before is not None:
            before = _pick(before, ~last)
        if len(active):
            x = dpm_solver_step(path, now, times[row + 1, sent(active, times.device)], before)
            before = now
    order = torch.cat([index for index, _ in finished]).argsort()
    joined = Noised(*(torch.cat(parts) for parts in zip(*(state for _, state in finished), strict=True)))
    return _pick(joined, order)


def _at(path: Path, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (alpha, sigma, log(alpha / sigma)) at t, each broadcastable against ``like``."""
    alpha, sigma = (expand(c, like) for c in path.coefficients(t))
    return alpha, sigma, alpha.log() - sigma.log()


def _pick(state: Noised, index: Tensor) -> Noised:
    return Noised(*(value[sent(index, value.device)] for value in state))


def _rows(cond: Cond, index: Tensor) -> Cond:
    return {name: value[sent(index, value.device)] for name, value in cond.items()}
