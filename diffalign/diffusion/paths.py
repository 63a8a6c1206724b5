"""Noising paths x_t = alpha(t) x0 + sigma(t) eps, read off any diffusers scheduler configuration.

Variance-preserving paths (DDPM, Ho et al. 2020, arXiv 2006.11239) keep the float32 table that the model was
trained with: a published number is reproduced from its own table, so nothing is recomputed in higher
precision. Rectified flow (Liu et al. 2022, arXiv 2209.03003) has alpha = 1 - t, sigma = t. Zero terminal
SNR: Lin et al. 2023, arXiv 2305.08891, Algorithm 1.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError, unknown
from diffalign.types import Path, Target

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
        alphas_cumprod: (N,), the table of the N training steps; index i is time i / N.
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
        squared = self.alphas_cumprod.to(t.device)[self.index(t)].to(t.dtype)
        return squared.sqrt(), (1 - squared).sqrt()

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return the integer timestep 0 .. N-1 that the network was trained with, (B,) int64.

        A negative time, which released DDIM inversions start from, is told as it is.
        """
        return (t * self.steps).round().long().clamp(max=self.steps - 1)

    def to(self, device: torch.device | str) -> "VariancePreserving":
        """Return the path with its table on ``device``."""
        return VariancePreserving(self.alphas_cumprod.to(device))


@dataclass(frozen=True)
class TokenLine:
    """The line that a dynamic shift is on: exp(mu) with mu through two points.

    Attributes:
        patch: latents along one side of a token; frames are tokens of their own.
        tokens: numbers of tokens.
        mu: there; the defaults are those of diffusers' FLUX and SD3.5 pipelines.
    """

    patch: int = 2
    tokens: tuple[int, int] = (256, 4096)
    mu: tuple[float, float] = (0.5, 1.15)

    def __post_init__(self) -> None:
        if self.patch < 1 or self.tokens[0] == self.tokens[1]:
            raise UserError(
                f"time.line: patch={self.patch}, tokens={self.tokens}; allowed: 1 or more, and two numbers"
            )

    def at(self, count: float) -> float:
        """mu of so many tokens."""
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
    """alpha = 1 - t, sigma = t; the network is told ``scale`` t.

    Attributes:
        scale: what t = 1 is called by the network (1000 for SD3, 1 for FLUX's transformer).
        line: of the model's dynamic shift; None where no model is known.
    """

    scale: float = 1000.0
    line: TokenLine | None = None

    def coefficients(self, t: Float[Tensor, " B"]) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
        """Return (1 - t, t), each (B,)."""
        return 1 - t, t

    def model_time(self, t: Float[Tensor, " B"]) -> Tensor:
        """Return ``scale`` t, (B,)."""
        return t * self.scale

    def to(self, device: torch.device | str) -> "RectifiedFlow":
        """Itself: there is no table to move."""
        return self


def path_from_config(config: Mapping[str, Any], patch: int | None = None) -> tuple[Path, Target]:
    """Return the path and prediction target that a diffusers scheduler configuration describes.

    Args:
        patch: latents along one side of the network's tokens, for a flow's line; None: it has none.

    Raises:
        UserError: unknown beta schedule, prediction type or kind of timesteps.
    """
    prediction = config.get("prediction_type", "epsilon")
    timestep_type = config.get("timestep_type", "discrete")
    if timestep_type != "discrete":  # the network is given log sigma (Stable Video Diffusion, CosXL)
        raise unknown("timestep_type in the scheduler configuration", timestep_type, ["discrete"])
    euler = "beta_schedule" not in config and ("shift" in config or "use_dynamic_shifting" in config)
    if euler or config.get("use_flow_sigmas"):  # Wan's multistep schedulers keep their betas beside them
        if not euler and prediction != "flow_prediction":
            raise unknown(
                "prediction_type of a scheduler with use_flow_sigmas", prediction, ["flow_prediction"]
            )
        line = None if patch is None else token_line(config, patch)
        return RectifiedFlow(float(config.get("num_train_timesteps", 1000)), line), "flow"
    if prediction not in TARGETS:
        raise unknown("prediction_type in the scheduler configuration", prediction, TARGETS)
    return VariancePreserving(alphas_cumprod_from_config(config)), TARGETS[prediction]


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Float[Tensor, " N"]:
    """Return (N,) table of a diffusers scheduler configuration, equal bit for bit to the scheduler's own:
    float32, but float64 of CogVideoX's schedulers, whose configurations always name an ``snr_shift_scale``.
    """
    if "snr_shift_scale" in config:
        return _shifted_alphas_cumprod(config)
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr", False):
        betas = zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0)


def _shifted_alphas_cumprod(config: Mapping[str, Any]) -> Float[Tensor, " N"]:
    """CogVideoX's table: the usual one, its signal-to-noise ratio divided by ``snr_shift_scale``, then its
    last step made pure noise.
    """
    scale = float(config["snr_shift_scale"])
    table = torch.cumprod(1.0 - _betas(config, root=torch.float64), dim=0)
    table = table / (scale + (1 - scale) * table)
    if config.get("rescale_betas_zero_snr", False):
        root = table.sqrt()
        table = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return table


def zero_terminal_snr(betas: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return (N,) betas that end in pure noise: sqrt(alphas_cumprod) shifted and scaled to end at 0."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1.0 - alphas


def _betas(config: Mapping[str, Any], root: torch.dtype = torch.float32) -> Tensor:
    """Return (N,) betas; ``root`` is the dtype that the ``scaled_linear`` schedule is made in."""
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
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
