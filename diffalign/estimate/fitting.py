"""Find options with which a run fits a GPU, added one after another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffalign.estimate.estimate import GIB, Estimate, estimate
from diffalign.estimate.workload import Workload

RESERVE, CONTEXT = 1.1, 0.6
"""Overheads beyond an estimate: the allocator's, as a factor, and CUDA's context, in GiB."""

_OF_TEXT = "--model.text_encoder.quantize int8"
_OF_MOMENTS = "--optimizer.type"
SHARE = 0.05
"""Part of the training memory that another optimizer must save; LoRA's state is not as much."""


@dataclass(frozen=True)
class Fit:
    """The estimate of a run with added options, for a GPU.

    Attributes:
        options: added flags, as typed on the command line, those of earlier tries included.
        estimate: estimate with these options.
        card: memory of the GPU, in GiB.
    """

    options: tuple[str, ...]
    estimate: Estimate
    card: float

    @property
    def needed(self) -> float:
        """GiB that the GPU needs for training or for filling the cache, whichever is larger."""
        peak = max(self.estimate.total_memory, self.estimate.encoder_memory)
        return RESERVE * peak / GIB + CONTEXT

    @property
    def fits(self) -> bool:
        """Whether the GPU has enough memory."""
        return self.needed <= self.card


def fitting(work: Workload, card: float) -> Iterator[Fit]:
    """Yield the run as it is, then with one more option at a time, up to the first that fits ``card`` GiB.

    Options are in the order of their cost: none, time, precision. They change the optimizer step by rounding
    only: a micro-batch of one pair is compensated by accumulation.
    """
    fit = Fit((), estimate(work), card)
    yield fit
    for option, change in _changes(work):
        if fit.fits:
            return
        if option == _OF_TEXT and fit.estimate.encoder_memory <= fit.estimate.total_memory:
            continue  # training needs more memory than filling the cache
        changed = change(work)
        if option.startswith(_OF_MOMENTS):
            before = fit.estimate.total_memory
            if _moments(fit.estimate) < SHARE * before:
                continue
            if before - estimate(changed).total_memory < SHARE * before:
                continue
        work = changed
        name = option.split()[0]
        others = tuple(other for other in fit.options if other.split()[0] != name)
        fit = Fit((*others, option), estimate(work), card)
        yield fit


def _changes(work: Workload) -> Iterator[tuple[str, Callable[[Workload], Workload]]]:
    """Yield options that the run does not have yet: the flag, and the change of the workload."""
    model, training = work.model, work.training
    if not model.gradient_checkpointing:
        yield "--model.gradient_checkpointing 2", _of_model(gradient_checkpointing=2)
    if int(model.gradient_checkpointing) != 1:
        yield "--model.gradient_checkpointing true", _of_model(gradient_checkpointing=True)
    if training.batch_size > 1 and not work.online:
        yield f"--training.batch_size 1 --training.accumulation {_pairs(work)}", _one_pair
    if training.mixed_precision == "no":
        yield "--training.mixed_precision bf16", _half
    if model.dtype == "float32":
        yield "--model.dtype bfloat16", _of_model(dtype="bfloat16")
    alone = training.shard == "none"  # sharded moments must be those of adamw
    if not model.offload_activations and not model.compile and alone and training.context == 1:
        yield "--model.offload_activations true", _of_model(offload_activations=True)
    if work.optimizer.type == "adamw" and alone:
        yield f"{_OF_MOMENTS} adamw8bit", _of_optimizer("adamw8bit")
    if work.optimizer.type in ("adamw", "adamw8bit") and alone:
        yield f"{_OF_MOMENTS} paged_adamw8bit", _of_optimizer("paged_adamw8bit")
    if model.text_encoder.quantize == "none" and not model.text_encoder.lora.rank:
        text = replace(model.text_encoder, quantize="int8")
        yield _OF_TEXT, _of_model(text_encoder=text)
    if model.train == "lora" and model.quantize == "none" and not model.lora.dora and not model.compile:
        for kind in ("int8", "nf4"):
            yield f"--model.quantize {kind}", _of_model(quantize=kind)


def _of_model(**fields: Any) -> Callable[[Workload], Workload]:
    return lambda work: replace(work, model=replace(work.model, **fields))


def _of_optimizer(name: Literal["adamw8bit", "paged_adamw8bit"]) -> Callable[[Workload], Workload]:
    return lambda work: replace(work, optimizer=replace(work.optimizer, type=name))


def _moments(told: Estimate) -> int:
    """Return the bytes of optimizer state on the device."""
    return sum(value for name, value in told.memory.items() if name.startswith("optimizer state"))


def _half(work: Workload) -> Workload:
    return replace(work, training=replace(work.training, mixed_precision="bf16"))


def _pairs(work: Workload) -> int:
    return work.training.batch_size * work.training.accumulation


def _one_pair(work: Workload) -> Workload:
    """Return the workload with micro-batches of one pair and the same number of pairs a step."""
    one = replace(work.training, batch_size=1, accumulation=_pairs(work))
    return replace(work, rows=work.rows // work.training.batch_size, training=one)
