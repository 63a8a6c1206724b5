"""Noising paths x_t = alpha(t) x0 + sigma(t) eps, as a diffusers scheduler configuration describes them.

Variance-preserving paths (DDPM, Ho et al. 2020, arXiv 2006.11239) keep the float32 table that the model was
trained with; the table is not recomputed in higher precision, so that published numbers are reproduced.
Rectified flow (Liu et al. 2022, arXiv 2209.03003) has alpha = 1 - t, sigma = t. EDM: Karras et al. 2022,
arXiv 2206.00364, table 1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.betas import alphas_cumprod_from_config, training_steps
from diffalign.errors import UserError, unknown
from diffalign.types import Path, Target
from diffalign.utils.transfer import sent

TARGETS: Mapping[str, Target] = {
    "epsilon": "eps",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True, eq=False)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1, with alpha^2 the cumulative product of 1 - beta.

    Attributes:
        alphas_cumprod: (N,) table of the N training steps; index i is time i / N.
    """

    alphas_cumprod: Float[Tensor, " N"]

    @property
    def steps(self) -> int:
        """N, the number of training steps."""
        return len(self.alphas_cumprod)

    def index(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return the exact table index round(t N) of each time, (B,) int64; t = 1 is the last step."""
        return (t * self.steps).round().long().clamp(0, self.steps - 1)

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (alpha, sigma), each (B,) in t's dtype."""
        squared = sent(self.alphas_cumprod, t.device)[self.index(t)].to(t.dtype)
        return squared.sqrt(), (1 - squared).sqrt()

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return the integer timestep 0 .. N-1 that the network was trained with, (B,) int64.

        A negative time, from which released DDIM inversions start, is not clamped.
        """
        return (t * self.steps).round().long().clamp(max=self.steps - 1)

    def to(self, device: torch.device | str) -> "VariancePreserving":
        """Return the path with its table on ``device``."""
        return VariancePreserving(self.alphas_cumprod.to(device))


@dataclass(frozen=True)
class TokenLine:
    """Dynamic time shift exp(mu), with mu linear in the number of tokens.

    Attributes:
        patch: latent cells along one side of a token; a token lies in one frame.
        tokens: two numbers of tokens, through which the line is given.
        mu: values of mu at ``tokens``; the defaults are those of diffusers' FLUX and SD3.5 pipelines.
    """

    patch: int = 2
    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)

    def __post_init__(self) -> None:
        if self.patch < 1 or self.tokens[0] == self.tokens[1]:
            raise UserError(
                f"time.line: patch={self.patch}, tokens={self.tokens}; allowed: a patch of 1 or more, "
                "and two different numbers of tokens"
            )

    def at(self, count: float) -> float:
        """Return mu for ``count`` tokens."""
        slope = (self.mu[1] - self.mu[0]) / (self.tokens[1] - self.tokens[0])
        return self.mu[0] + slope * (count - self.tokens[0])

    def factor(self, shape: Sequence[int]) -> float:
        """Return the shift of latents of ``shape``, (C, h, w) or (C, F, h, w)."""
        frames = math.prod(shape[1:-2])
        return math.exp(self.at(frames * (shape[-2] // self.patch) * (shape[-1] // self.patch)))


def token_line(config: Mapping[str, Any], patch: int) -> TokenLine:
    """Return the line of a diffusers scheduler configuration; defaults as in ``TokenLine``."""
    tokens, mu = TokenLine.tokens, TokenLine.mu
    return TokenLine(
        patch,
        (config.get("base_image_seq_len", tokens[0]), config.get("max_image_seq_len", tokens[1])),
        (config.get("base_shift", mu[0]), config.get("max_shift", mu[1])),
    )


@dataclass(frozen=True)
class RectifiedFlow:
    """Rectified flow: alpha = 1 - t, sigma = t; the network's time input is ``scale`` t.

    Attributes:
        scale: the network's time input at t = 1 (1000 for SD3, 1 for FLUX's transformer).
        line: the model's dynamic shift; None if the model is not known.
        integer_times: whether the time input is rounded down to an integer below ``scale`` (Wan's UniPC).
        guided_patch: latent cells along a token's side; guided tokens get the conditional norm (Qwen-Image).
        guided_rows: the same rescaling for each row of latents of a channel (Lumina 2).
        span: the times, from and to, at which the model calls the network (``spans.py``).
    """

    scale: float = 1000.0
    line: TokenLine | None = None
    integer_times: bool = False
    guided_patch: int | None = None
    guided_rows: bool = False
    span: tuple[float, float] = (0.0, 1.0)

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (1 - t, t), each (B,)."""
        return 1 - t, t

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return ``scale`` t, (B,); int64, rounded down, with ``integer_times``."""
        if not self.integer_times:
            return t * self.scale
        # 1e-4 undoes a rounding of float32 to just below an integer
        return (t.double() * self.scale + 1e-4).floor().clamp(max=self.scale - 1).long()

    def to(self, device: torch.device | str) -> "RectifiedFlow":
        """Return the path itself, which has no table to move."""
        return self


@dataclass(frozen=True)
class EDM:
    """EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1) as a variance-preserving path.

    With y0 = x0 / sigma_data, latents of std 1, and r = sqrt(sigma^2 + sigma_data^2), the network's input
    c_in (x0 + sigma eps) is alpha y0 + s eps with alpha = sigma_data / r, s = sigma / r. Equation 7,
    D = c_skip x + c_out F, is then y0 = alpha x_t - s v with F = v for c_out = -sigma sigma_data / r
    (``v_prediction`` in diffusers) and F = -v for the paper's c_out (``epsilon``); the paper's weight lambda
    makes the loss that of F. The network's time input is c_noise = ln(sigma) / 4.

    Time t in [0, 1] runs from ``sigma_min`` to ``sigma_max`` along equation 5 (``karras``) or log-linearly
    (``exponential``): uniform times are the scheduler's own table, as EDMEulerScheduler makes it.

    Attributes:
        sigma_data: standard deviation of the latents, above 0.
        negated: whether the network predicts -v.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    schedule: str = "karras"
    negated: bool = True

    def sigma(self, t: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Return EDM's noise level of each time, (B,) in t's dtype."""
        u = t.double().clamp(0, 1)
        if self.schedule == "exponential":
            level = self.sigma_min * (self.sigma_max / self.sigma_min) ** u
        else:
            low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
            level = (low + u * (high - low)) ** self.rho
        return level.to(t.dtype)

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (alpha, sigma) of the scaled latents, each (B,) in t's dtype."""
        level = self.sigma(t)
        root = (level**2 + self.sigma_data**2).sqrt()
        return self.sigma_data / root, level / root

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return c_noise = ln(sigma) / 4, (B,)."""
        return self.sigma(t).log() / 4

    def grid(self, steps: int) -> Float[Tensor, " S"]:
        """Return (steps + 1,) descending, evenly spaced float64 times, as the scheduler's are."""
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def to(self, device: torch.device | str) -> "EDM":
        """Return the path itself, which has no table to move."""
        return self


def _edm(config: Mapping[str, Any]) -> tuple[EDM, Target]:
    """Return the path of an EDM scheduler's configuration.

    Raises:
        UserError: unknown prediction type or sigma schedule, or numbers out of range.
    """
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise unknown(
            "prediction_type of a scheduler with EDM's preconditioning",
            prediction,
            ["epsilon", "v_prediction"],
        )
    schedule = config.get("sigma_schedule", "karras")
    if schedule not in ("karras", "exponential"):
        raise unknown("sigma_schedule in the scheduler configuration", schedule, ["karras", "exponential"])
    low, high, data, rho = (
        float(config.get(name, getattr(EDM, name)))
        for name in ("sigma_min", "sigma_max", "sigma_data", "rho")
    )
    if not 0 < low < high < math.inf or not 0 < data < math.inf or not 0 < rho < math.inf:
        raise UserError(
            f"the scheduler's sigma_min={low}, sigma_max={high}, sigma_data={data}, rho={rho}; allowed: "
            "0 < sigma_min < sigma_max, the others more than 0"
        )
    return EDM(low, high, data, rho, schedule, prediction == "epsilon"), "v"


def path_from_config(config: Mapping[str, Any], patch: int | None = None) -> tuple[Path, Target]:
    """Return the path and prediction target that a diffusers scheduler configuration describes.

    Args:
        config: the scheduler configuration.
        patch: latent cells along one side of the network's tokens, for the dynamic shift of a flow; None: the
            path has no ``line``.

    The network of an ``EDM`` path may predict -v for the target v: see ``EDM.negated``.

    Raises:
        UserError: unknown beta schedule, prediction type or kind of timesteps.
    """
    if "sigma_data" in config:
        return _edm(config)
    prediction = config.get("prediction_type", "epsilon")
    timestep_type = config.get("timestep_type", "discrete")
    if timestep_type != "discrete":  # the network is given log sigma (Stable Video Diffusion, CosXL)
        raise unknown("timestep_type in the scheduler configuration", timestep_type, ["discrete"])
    euler = "beta_schedule" not in config and ("shift" in config or "use_dynamic_shifting" in config)
    if euler or config.get("use_flow_sigmas"):  # Wan's multistep schedulers have beta_schedule too
        if not euler and prediction != "flow_prediction":
            raise unknown(
                "prediction_type of a scheduler with use_flow_sigmas", prediction, ["flow_prediction"]
            )
        _check_flow(config)
        line = None if patch is None else token_line(config, patch)
        return RectifiedFlow(float(training_steps(config)), line, not euler), "flow"
    if prediction not in TARGETS:
        raise unknown("prediction_type in the scheduler configuration", prediction, TARGETS)
    return VariancePreserving(alphas_cumprod_from_config(config)), TARGETS[prediction]


def _check_flow(config: Mapping[str, Any]) -> None:
    """Check the settings of a flow's scheduler that change what time means.

    Raises:
        UserError: times that run from data to noise, or a shift or a line of shifts that is none.
    """
    if config.get("invert_sigmas"):
        raise UserError(
            "invert_sigmas=true, times from data to noise (Mochi), is not trained here; allowed: false"
        )
    least = {"shift": 0.0, "base_image_seq_len": 0.0, "max_image_seq_len": 0.0}
    for name in (*least, "base_shift", "max_shift"):
        value, low = config.get(name, 1), least.get(name, -math.inf)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value < math.inf:
            allowed = "a number above 0" if name in least else "a number"
            raise UserError(f"{name}={str(value)[:40]}; allowed: {allowed}")
