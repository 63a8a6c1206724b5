"""Tables of betas of diffusers scheduler configurations, and their cumulative products.

Zero terminal SNR: Lin et al. 2023, arXiv 2305.08891, algorithm 1.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError, unknown

MOST_STEPS = 1_000_000
"""Largest accepted number of training steps of a scheduler."""


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Float[Tensor, " N"]:
    """Return a scheduler configuration's own table, (N,) float32; float64 with ``snr_shift_scale``."""
    if "snr_shift_scale" in config:
        return _shifted_alphas_cumprod(config)
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr", False):
        betas = zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _shifted_alphas_cumprod(config: Mapping[str, Any]) -> Float[Tensor, " N"]:
    """Return CogVideoX's table, (N,) float64: the usual one with its SNR divided by ``snr_shift_scale``."""
    scale = float(config["snr_shift_scale"])
    table = torch.cumprod(1.0 - _betas(config, root=torch.float64), dim=0)
    table = table / (scale + (1 - scale) * table)
    if config.get("rescale_betas_zero_snr", False):
        root = table.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return table


def zero_terminal_snr(betas: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return betas (N,) with zero terminal SNR: sqrt(alphas_cumprod) is shifted and scaled to end at 0."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


def _betas(config: Mapping[str, Any], root: torch.dtype = torch.float32) -> Tensor:
    """Return betas (N,); ``root`` is the dtype in which ``scaled_linear`` is computed.

    Raises:
        UserError: no training steps, or betas that are not in [0, 1].
    """
    betas = _table_of_betas(config, root)
    if not len(betas):
        raise UserError("no num_train_timesteps or trained_betas; allowed: 1 or more")
    if not ((betas >= 0) & (betas <= 1)).all():  # also true for NaN
        worst = betas[~((betas >= 0) & (betas <= 1))][0]
        raise UserError(f"betas such as {worst:g} (beta_start, beta_end, trained_betas); allowed: 0 to 1")
    if not betas.any():
        raise UserError("betas are all 0 (beta_start, beta_end, trained_betas), which adds no noise")
    if config.get("trained_betas") is not None and len(betas) != training_steps(config):
        raise UserError(
            f"{len(betas)} trained_betas for num_train_timesteps={training_steps(config)}; allowed: as many"
        )
    return betas


def training_steps(config: Mapping[str, Any]) -> int:
    """Return ``num_train_timesteps``; raise UserError if it is not an integer in the allowed range."""
    steps = config.get("num_train_timesteps", 1000)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise UserError(f"num_train_timesteps={str(steps)[:40]}; allowed: 1 to {MOST_STEPS:,}")
    return steps


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number of a scheduler configuration; raise UserError if it is not finite and at least 0."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise UserError(f"{name}={str(value)[:40]}; allowed: a number from 0 to 1")
    return float(value)


def _table_of_betas(config: Mapping[str, Any], root: torch.dtype) -> Tensor:
    steps = training_steps(config)
    start, end = (_number(config, name, value) for name, value in (("beta_start", 1e-4), ("beta_end", 0.02)))
    schedule = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=root) ** 2
    if schedule == "squaredcos_cap_v2":
        bar = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
        return torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)], dtype=torch.float32)
    raise unknown(
        "beta_schedule in the scheduler configuration",
        schedule,
        ["linear", "scaled_linear", "squaredcos_cap_v2"],
    )
