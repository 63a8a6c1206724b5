"""The configuration of ``diffalign train-reward``, which trains a reward model. Imports no torch.

It shares sections with ``diffalign.config.schema``; the section ``reward`` is its own.
"""

from dataclasses import dataclass
from typing import TypeVar

from diffalign.config.fields import BATCH, BELOW_ONE, FOLDER, SHARE, Rule, at_least, option, section
from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)

_START: Rule = (lambda v: bool(v.strip())), "a hub id, a folder, tiny:clip or step_aware:SOURCE"
_TIMES: Rule = (lambda v: bool(v) and all(0 <= t < 1 for t in v)), "times from 0 to below 1"


@dataclass(frozen=True)
class RewardConfig:
    """The step-aware preference model, and the clean estimates that it is trained on."""

    start: str = option(
        "yuvalkirstain/PickScore_v1",
        "CLIP to start from: hub id, folder, tiny:clip, or step_aware:SOURCE to go on with one",
        _START,
    )
    guidance: float = option(
        5.0, "scale of classifier-free guidance of the model's estimates; 1: none", at_least(0)
    )
    low: float = option(0.0, "times are uniform in [low, high), 0 being data", SHARE)
    high: float = option(1.0, "end of the times", SHARE)
    threshold: float = option(
        0.0, "a tie if the softmax of two labels differs by no more; human labels: 0", BELOW_ONE
    )
    decoder: str | None = option(None, "folder or hub id of a tiny autoencoder that decodes the estimates")
    at_once: int = option(8, "images that are denoised and decoded at once", BATCH)
    evaluated: tuple[float, ...] = option(
        (0.0, 0.25, 0.5, 0.7, 0.95), "times of the held-out accuracy", _TIMES
    )


@dataclass(frozen=True)
class RewardRun:
    """The configuration of the training of a reward model."""

    output: str = option("runs/reward", "the run directory", FOLDER)
    resume: str | None = option(None, "continue exactly from a checkpoint: latest, or its folder")
    overwrite: bool = option(False, "replace another run in the output folder, which is an error otherwise")
    reward: RewardConfig = section(RewardConfig)
    model: ModelConfig = section(ModelConfig)
    data: DataConfig = section(DataConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    training: TrainingConfig = section(TrainingConfig)
    logging: LoggingConfig = section(LoggingConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)


AnyRun = TypeVar("AnyRun", Run, RewardRun)
"""A run of ``train`` or of ``train-reward``."""
