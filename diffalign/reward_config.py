"""The tree of ``diffalign train-reward``: a reward model trained on preferences. No torch.

Its sections are those of ``diffalign.config`` where they mean the same; ``reward`` is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from diffalign.config_check import RULES, Rule, check_shared, get
from diffalign.errors import UserError


@dataclass(frozen=True)
class RewardConfig:
    """The step-aware preference model, and the clean estimates that it is shown."""

    # the CLIP that it starts from: hub id, folder, tiny:clip, or step_aware:SOURCE to go on with one
    start: str = "yuvalkirstain/PickScore_v1"
    guidance: float = 5.0  # classifier-free, of the model's estimates; 1: none
    low: float = 0.0  # times are uniform from here, in [0, 1] ...
    high: float = 1.0  # ... to below here
    threshold: float = 0.0  # a tie if the softmax of two labels differs by no more; human labels: 0
    decoder: str | None = None  # folder or hub id of a tiny autoencoder that decodes the estimates
    at_once: int = 8  # images that are denoised and decoded at once
    evaluated: tuple[float, ...] = (0.0, 0.25, 0.5, 0.7, 0.95)  # times of the held-out accuracy


@dataclass(frozen=True)
class RewardRun:
    """Everything that the training of a reward is made of."""

    output: str = "runs/reward"
    resume: str | None = None  # "latest", or a checkpoint folder
    overwrite: bool = False  # an output folder that holds another run is an error otherwise
    reward: RewardConfig = field(default_factory=RewardConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


MEANINGLESS = (
    "model.train",
    "model.lora",
    "model.gradient_checkpointing",
    "model.compile",
    "data.view",
    "data.likes_share",
    "data.best",
    "data.altered",
    "data.prompt_dropout",
    "training.reference_every",
    "training.reference_mix",
    "logging.diagnostics_bins",
)
"""What the shared sections say about aligning a diffusion model; here the model is frozen."""

_RULES: Mapping[str, Rule] = {
    **RULES,
    "reward.start": ((lambda v: bool(v.strip())), "a hub id, a folder, tiny:clip or step_aware:SOURCE"),
    "reward.guidance": ((lambda v: v >= 0), "0 or more; 1 is none"),
    "reward.threshold": ((lambda v: 0 <= v < 1), "0 or more and less than 1"),
    "reward.at_once": ((lambda v: v >= 1), "1 or more"),
    "reward.evaluated": ((lambda v: bool(v) and all(0 <= t < 1 for t in v)), "times from 0 to below 1"),
}


def validate(run: RewardRun, needs: tuple[str, ...] = ()) -> None:
    """Checks every value of a run.

    Args:
        run: what ``config_io.tree_from(RewardRun, ...)`` gave.
        needs: dotted fields that must not be empty.

    Raises:
        UserError: the first value that is not allowed, with its dotted place and what is.
    """
    check_shared(run, needs, _RULES)
    if not 0 <= run.reward.low < run.reward.high <= 1:
        raise UserError(
            f"reward.low={run.reward.low}, reward.high={run.reward.high}; allowed: 0 <= low < high <= 1"
        )
    usual: Any = RewardRun()
    for dotted in MEANINGLESS:
        if get(run, dotted) != get(usual, dotted):
            raise UserError(
                f"{dotted}={get(run, dotted)!r} means nothing to train-reward, where the diffusion model is "
                f"frozen; leave it at {get(usual, dotted)!r}"
            )
