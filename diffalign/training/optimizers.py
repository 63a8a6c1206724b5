"""Optimizers and learning-rate schedules.

Adafactor has the settings of the published SDXL Diffusion-DPO run: no parameter scaling, no relative step,
update clipping at 1 (SalesforceAIResearch/DiffusionDPO train.py). AdamW uses torch's fused kernel if there is
one.

The 8-bit and the paged AdamW are those of bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861, and 2023,
arXiv 2305.14314). Paged moments lie in CUDA's unified memory, whose pages go to main memory where the GPU is
short of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config.schema import OptimizerConfig, TrainingConfig
from diffalign.errors import UserError, unknown

OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "paged_adamw", "paged_adamw8bit")
OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
_FUSED_DEVICES = {"cpu", "cuda", "xpu"}


def build(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters, with ``learning_rate`` as its initial rate.

    Raises:
        UserError: an unknown type, a type whose package is not installed, or a paged one on a CPU.
    """
    parameters = list(parameters)
    betas, eps, decay = (config.betas[0], config.betas[1]), config.eps, config.weight_decay
    match config.type:
        case "adamw":
            fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in parameters)
            return torch.optim.AdamW(parameters, learning_rate, betas, eps, decay, fused=fused)
        case "adamw8bit" | "paged_adamw" | "paged_adamw8bit":
            for parameter in parameters:
                check_device(config.type, parameter.device)
            try:
                import bitsandbytes
            except ImportError:
                raise UserError(
                    f"optimizer.type={config.type} needs bitsandbytes, which is not installed: "
                    "pip install bitsandbytes"
                ) from None
            kind: type[torch.optim.Optimizer] = getattr(bitsandbytes.optim, OF_BITSANDBYTES[config.type])
            return kind(parameters, learning_rate, betas, eps, decay)  # type: ignore[call-arg, arg-type]
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


def check_device(kind: str, device: torch.device) -> None:
    """Check that an optimizer runs on a device: paged ones need a GPU, whose memory they page.

    Raises:
        UserError: a paged optimizer on a CPU, where bitsandbytes would page nothing.
    """
    if kind.startswith("paged") and device.type == "cpu":
        raise UserError(
            f"optimizer.type={kind} on a CPU, where there is no GPU memory to page; allowed: "
            f"{kind.removeprefix('paged_')}, or a GPU"
        )


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """Put the moments of a paged optimizer back into paged memory, in place; of another, do nothing.

    Bitsandbytes loads a state into plain memory of the device, where it would stay.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # within accelerate's wrapper
    if not getattr(inner, "is_paged", False):
        return
    for parameter, moments in inner.state.items():
        for name in ("state1", "state2"):
            if isinstance(moments.get(name), Tensor):
                loaded = moments[name]
                moments[name] = inner.get_state_buffer(parameter, dtype=loaded.dtype).copy_(loaded)


def base_learning_rate(config: OptimizerConfig, settings: TrainingConfig, processes: int) -> float:
    """Return the peak learning rate.

    ``scale_lr`` multiplies it by the global batch size in groups, as in the published scripts.
    """
    scale = settings.batch_size * settings.accumulation * processes if config.scale_lr else 1
    return config.learning_rate * scale


@dataclass(frozen=True)
class Schedule:
    """Learning rate by optimizer step: linear warm-up, then constant or falling to zero.

    Steps are optimizer steps of the run, independent of the number of processes. The first step has the rate
    ``peak / warmup`` (common schedulers have 0). It is a pure function of the step, without state.

    Attributes:
        kind: shape after the warm-up, with progress p in [0, 1): "constant"; "linear", 1 - p; "cosine";
            "cosine_with_restarts", over ``cycles`` periods; or "polynomial", (1 - p)^``power``.
        peak: rate after the warm-up.
        warmup: number of warm-up steps, at least 0.
        steps: number of steps of the run.
        cycles: number of periods of "cosine_with_restarts".
        power: exponent of "polynomial".
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
        """Return the learning rate of a step, counted from 0."""
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
