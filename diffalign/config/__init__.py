"""The configuration: frozen dataclasses, read from YAML and flags. Importing it does not import torch."""

from diffalign.config.reward_schema import RewardConfig, RewardRun
from diffalign.config.schema import (
    AlteredConfig,
    CheckpointConfig,
    CurriculumConfig,
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "AlteredConfig",
    "CheckpointConfig",
    "CurriculumConfig",
    "DataConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RewardRun",
    "RolloutConfig",
    "Run",
    "TrainingConfig",
    "ValidationConfig",
]
