"""What an estimate reads of a run: its model, optimizer and loop, and what one micro-batch holds."""

from dataclasses import dataclass

from diffalign.config.schema import ModelConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Workload:
    """A run as far as memory and FLOPs go; ``runs.micro_batch.workload_of`` makes it.

    Attributes:
        height: of the trained images or videos, in pixels.
        width: likewise.
        frames: of a video; None for images.
        rows: samples that a micro-batch shows the network with gradient, each time of one counted.
        needs_reference: whether the method asks a reference.
        online: whether samples are drawn and judged while training.
        adapter_sets: sets of adapters that are trained; a method with assistants has more than one.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    height: int
    width: int
    frames: int | None
    rows: int
    needs_reference: bool
    online: bool
    adapter_sets: int = 1
