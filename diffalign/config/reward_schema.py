"""The tree of ``diffalign train-reward``: a reward model trained on preferences. No torch.

Its sections are those of ``diffalign.config.schema`` where they mean the same; ``reward`` is its own.
"""

from dataclasses import dataclass, field

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)


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
