"""The inputs of an estimate: the model, optimizer and loop of a run, and the size of a micro-batch."""

from dataclasses import dataclass

from diffalign.config.schema import ModelConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class Workload:
    """The properties of a run that determine its memory and FLOPs; see ``runs.micro_batch.workload_of``.

    Attributes:
        model: the model's section.
        optimizer: the optimizer's section.
        training: the loop's section.
        height: height of the training samples, in pixels.
        width: width of the training samples, in pixels.
        frames: frames of a video; None for images.
        rows: network inputs of a micro-batch that need gradients: samples times times.
        needs_reference: whether the method uses a reference.
        online: whether samples are drawn and scored during training.
        both_experts: whether the other one of two experts lies on the device, too: samples take both.
        adapter_sets: number of trained sets of adapters; more than one for methods with assistants.
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
    both_experts: bool = False
    adapter_sets: int = 1
