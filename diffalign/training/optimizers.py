"""Optimizers and learning-rate schedules.

Adafactor as the published SDXL Diffusion-DPO run sets it: no parameter scaling, no relative step, update
clipping at 1 (SalesforceAIResearch/DiffusionDPO train.py). AdamW uses torch's fused kernel where there is
one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.errors import UserError, unknown

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
_FUSED_DEVICES = {"cpu", "cuda", "xpu"}


def build(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimizer over trainable parameters, at ``learning_rate`` until a schedule sets another.

    Raises:
        UserError: an unknown type, or a type whose package is not installed.
    """
    parameters = list(parameters)
    betas, eps, decay = (config.betas[0], config.betas[1]), config.eps, config.weight_decay
    match config.type:
        case "adamw":
            fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
            return torch.optim.AdamW(parameters, learning_rate, betas, eps, decay, fused=fused)
        case "adamw8bit":
            try:
                import bitsandbytes
            except ImportError:
                raise UserError(
                    "optimizer.type=adamw8bit needs bitsandbytes, which is not installed: "
                    "pip install bitsandbytes"
                ) from None
            return bitsandbytes.optim.AdamW8bit(parameters, learning_rate, betas, eps, decay)
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(
                parameters,
                lr=learning_rate,
                weight_decay=config.weight_decay,
                clip_threshold=1.0,
                scale_parameter=False,
                relative_step=False,
                warmup_init=False,
            )
    raise unknown("optimizer.type", config.type, OPTIMIZERS)


def base_learning_rate(config: OptimizerConfig, settings: TrainingConfig, processes: int) -> float:
    """Return the peak learning rate; ``scale_lr`` multiplies by the global batch size in groups, as the
    published scripts do.
    """
    scale = settings.batch_size * settings.accumulation * processes if config.scale_lr else 1
    return config.learning_rate * scale


@dataclass(frozen=True)
class Schedule:
    """The learning rate of optimizer step ``step`` (from 0): linear warm-up, then constant or falling to
    zero: linear, cosine, cosine over ``cycles`` periods, or (1 - progress)^``power``.

    Steps are optimizer steps of the whole run, whatever the number of processes. The first step already
    moves, at ``peak / warmup``, where the usual schedulers spend it at zero. A pure function, so a checkpoint
    keeps none of it.
    """

    kind: str
    peak: float
    warmup: int
    steps: int
    cycles: int = 1
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise unknown("optimizer.schedule", self.kind, SCHEDULES)
        if self.warmup < 0:
            raise UserError(f"optimizer.warmup_steps={self.warmup}; allowed: 0 or more")

    def __call__(self, step: int) -> float:
        """Return the learning rate of one step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        match self.kind:
            case "linear":
                return self.peak * (1.0 - progress)
            case "cosine":
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
            case "cosine_with_restarts":
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * (self.cycles * progress % 1.0)))
            case "polynomial":
                return self.peak * (1.0 - progress) ** self.power
        return self.peak
