"""A run at one step: what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.training.sharding import is_sharded


@dataclass(frozen=True)
class Snapshot:
    """A run at one step: tensors by name, the optimizer's state, and ``facts`` that JSON can hold.

    ``content`` holds digests by name of what the run was made of (data, model); empty where none were kept.
    ``shards`` is the folder that the tensors are still to be read from, each process its part; None: they are
    here.
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
        """Whether its tensors are spread over processes, so that each must write its own."""
        return any(map(is_sharded, self.trainable.values()))
