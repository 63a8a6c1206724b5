"""State of a run in progress, which hooks read and checkpoints save."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError
from diffalign.training import shard_files
from diffalign.training.context import group_of
from diffalign.training.ema import Ema
from diffalign.training.guard import GradientGuard
from diffalign.training.metrics import Meter
from diffalign.training.optimizers import Schedule, page_again
from diffalign.training.sharding import assembled, free_gathered, is_sharded, placed_like
from diffalign.training.snapshot import Snapshot
from diffalign.types import Denoiser, Method, Stateful

_COUNTERS = ("step", "micro_step", "samples", "skipped_steps", "empty_steps", "overflow_steps")


@dataclass
class TrainState:
    """One run in progress.

    Attributes:
        method: the method.
        policy: the trained network as a denoiser.
        reference: the reference network as a denoiser.
        network: the prepared module, which training calls must use.
        parameters: trained parameters, by name.
        optimizer: the optimizer.
        schedule: learning rate by optimizer step.
        settings: settings of the loop.
        accelerator: processes, device and precision.
        guard: guard against spikes of the gradient norm.
        meter: metrics since the last record.
        ema: moving average of the parameters; None: there is none.
        kept: further tensors that hooks change (a reference that is updated), by name.
        step: number of optimizer steps, including those without an update.
        micro_step: number of micro-batches on each rank.
        samples: number of training samples on all ranks, once where a group of them shares samples.
        skipped_steps: number of steps that the gradient guard skipped.
        empty_steps: number of steps without an update because all terms had weight 0.
        overflow_steps: number of steps that float16's loss scaling skipped.
        seconds: training time without hooks, in seconds, including that before a resume.
        start_step: step from which this process started.
        loss: mean loss of the last step over all ranks; None if it had no terms.
        applied: whether the last step changed the parameters.
        interrupted: whether a signal or the source has ended the run.
        paused: what the source waits for, in words; "" if it does not.
    """

    method: Method[Any]
    policy: Denoiser
    reference: Denoiser
    network: nn.Module
    parameters: list[tuple[str, nn.Parameter]]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    settings: TrainingConfig
    accelerator: Accelerator
    guard: GradientGuard
    meter: Meter
    ema: Ema | None
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    step: int = 0
    micro_step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    empty_steps: int = 0
    overflow_steps: int = 0
    seconds: float = 0.0
    start_step: int = 0
    loss: float | None = None
    applied: bool = False
    interrupted: bool = False
    paused: str = ""
    _extra: dict[str, float] = field(default_factory=dict)
    _media: dict[str, Path] = field(default_factory=dict)

    def log(self, values: Mapping[str, float]) -> None:
        """Add values to this step's record, which is then written even between logging steps."""
        self._extra |= values

    def log_media(self, files: Mapping[str, Path]) -> None:
        """Add image and video files, by name, for the trackers to show with this step's record."""
        self._media |= files

    def take_media(self) -> dict[str, Path]:
        """Return and reset the files of ``log_media``."""
        media, self._media = self._media, {}
        return media

    def take_logged(self) -> dict[str, float]:
        """Return and reset the values of ``log``."""
        extra, self._extra = self._extra, {}
        return extra

    def averages(self) -> dict[str, float]:
        """Return means over all ranks since the last call, and the counters (a collective operation)."""
        values = self.meter.averages(self.accelerator)
        self.meter.clear()
        values["learning_rate"] = self.schedule(max(0, self.step - 1))
        values["skipped_steps"] = float(self.skipped_steps)
        values["empty_steps"] = float(self.empty_steps)
        if self.accelerator.scaler is not None:
            values["overflow_steps"] = float(self.overflow_steps)
        return values

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context in which the parameters hold their moving average, if there is one."""
        if self.ema is None:
            yield
            return
        free_gathered(self.network)
        with self.ema.swapped_in():
            yield
            free_gathered(self.network)

    @contextmanager
    def whole_weights(self) -> Iterator[bool]:
        """Context in which the trained, averaged weights are unsharded; yields whether this process writes.

        It is a collective operation if weights are sharded.
        """
        writes = self.accelerator.is_main_process
        network = self.accelerator.unwrap_model(self.network)
        with self.averaged_weights(), assembled(network, keep=writes):
            yield writes

    @contextmanager
    def evaluating(self, averaged: bool = True) -> Iterator[None]:
        """Context for evaluation: no gradients, no dropout, averaged weights.

        Args:
            averaged: whether the parameters hold their moving average.
        """
        training = self.network.training
        self.network.eval()
        try:
            with torch.no_grad(), self.averaged_weights() if averaged else nullcontext():
                yield
        finally:
            self.network.train(training)

    def snapshot(self) -> Snapshot:
        """Return the snapshot that resuming needs; tensors are not copied (a collective operation)."""
        scaler = self.accelerator.scaler
        return Snapshot(
            step=self.step,
            trainable={name: p.detach() for name, p in self.parameters},
            ema={} if self.ema is None else self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            facts={
                "counters": {name: getattr(self, name) for name in _COUNTERS},
                "seconds": self.seconds,
                "guard": self.guard.state_dict(),
                "meter": self.meter.of_all_ranks(self.accelerator)[:: self.settings.context],
                "scaler": {} if scaler is None else scaler.state_dict(),
                "method": self.method.state_dict() if isinstance(self.method, Stateful) else {},
            },
            kept={name: tensor.detach() for name, tensor in self.kept.items()},
        )

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Restore the state from a snapshot.

        Raises:
            UserError: the snapshot's tensors, optimizer state or counters are not those of this run.
        """
        trained = dict(self.parameters)
        if snapshot.shards is not None:
            averages = {} if self.ema is None else self.ema.state_dict()
            snapshot = shard_files.filled(snapshot, trained, self.kept, averages)
        _check_same_tensors(trained, snapshot.trainable)
        for name, parameter in self.parameters:
            parameter.copy_(placed_like(snapshot.trainable[name], parameter))
        _check_same_tensors(self.kept, snapshot.kept)
        for name, tensor in self.kept.items():
            tensor.copy_(placed_like(snapshot.kept[name], tensor))
        with _fits("optimizer.pt"):
            self.optimizer.load_state_dict(_placed(snapshot.optimizer, [p for _, p in self.parameters]))
            page_again(self.optimizer)
        if self.ema is not None:
            _check_same_tensors(self.ema.state_dict(), snapshot.ema)
            self.ema.load_state_dict(snapshot.ema)
        with _fits("state.json"):
            self._restore_facts(snapshot.facts)
        self.start_step = self.step

    def _restore_facts(self, facts: Mapping[str, Any]) -> None:
        for name in _COUNTERS:
            setattr(self, name, int(facts["counters"][name]))
        self.seconds = float(facts["seconds"])
        self.guard.load_state_dict(facts["guard"])
        self.meter.load_of_ranks(facts["meter"], *group_of(self.settings, self.accelerator))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if isinstance(self.method, Stateful):
            self.method.load_state_dict(facts["method"])


@contextmanager
def _fits(file: str) -> Iterator[None]:
    """Turn errors of a checkpoint's file that was read, but lacks what this run has, into one naming it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"the checkpoint's {file} does not fit this run: {why}; allowed: one of the same settings"
        ) from error


def _placed(optimizer: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Return an optimizer's state with its moments sharded like the parameters."""
    state = {
        number: {
            key: placed_like(value, parameters[number])
            if isinstance(value, Tensor) and is_sharded(parameters[number]) and value.ndim
            else value
            for key, value in moments.items()
        }
        for number, moments in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _check_same_tensors(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    shapes = (
        {name: tuple(t.shape) for name, t in expected.items()},
        {name: tuple(t.shape) for name, t in saved.items()},
    )
    differing = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
    if differing:
        name = differing[0]
        raise UserError(
            f"the checkpoint holds other tensors than this run: {len(differing)} differ, first {name!r} "
            f"(checkpoint {shapes[1].get(name, 'has none')}, run {shapes[0].get(name, 'has none')})"
        )
