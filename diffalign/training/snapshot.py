"""State of a run at one step, the content of a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.training.sharding import is_sharded


@dataclass(frozen=True)
class Snapshot:
    """State of a run at one step.

    Attributes:
        step: optimizer step.
        trainable: trained parameters by name.
        ema: their moving average by name; empty if there is none.
        optimizer: state of the optimizer.
        facts: counters and other state that JSON can represent.
        kept: other tensors that change, by name (``TrainState.kept``).
        content: digests of data and model by name; empty if they were not saved.
        shards: folder from which each process reads its part of the tensors; None: the tensors are loaded.
    """

    step: int
    trainable: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    facts: Mapping[str, Any]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    content: Mapping[str, str] = field(default_factory=dict)
    shards: Path | None = None

    @property
    def sharded(self) -> bool:
        """Whether tensors are sharded over processes, each of which writes its part."""
        return any(map(is_sharded, self.trainable.values()))
