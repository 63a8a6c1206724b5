"""Hooks of the loop: logging, progress, checkpoints, and functions that are called every N steps.

Hooks run on all ranks, in their order; ``standard_hooks`` returns the usual ones. Hooks that add values to a
step's record (``state.log``) must come before ``Logging``, and ``SaveCheckpoints`` must come last, so that a
checkpoint is saved after its step is logged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tqdm import tqdm

from diffalign.config.schema import CheckpointConfig, LoggingConfig
from diffalign.errors import UserError
from diffalign.training.checkpoint import Checkpoints
from diffalign.training.metrics import MetricsFile
from diffalign.training.state import TrainState
from diffalign.training.trackers import Tracker, check_trackers, open_trackers
from diffalign.utils.memory import peak_memory


@runtime_checkable
class Hook(Protocol):
    """An object that the loop calls around steps."""

    def on_start(self, state: TrainState) -> None:
        """Run before the first step, after a resumed run is restored."""
        ...

    def on_step(self, state: TrainState) -> None:
        """Run after each optimizer step; ``state.step`` includes it."""
        ...

    def on_end(self, state: TrainState) -> None:
        """Run after the last step, also of an interrupted run, but not after an error."""
        ...


@dataclass(frozen=True)
class Every:
    """Hook that calls ``function(state)`` every ``steps`` optimizer steps (0: never), on all ranks."""

    steps: int
    function: Callable[[TrainState], None]

    def on_start(self, state: TrainState) -> None:
        """Do nothing."""

    def on_step(self, state: TrainState) -> None:
        """Call the function every ``steps`` steps."""
        if self.steps and state.step % self.steps == 0:
            self.function(state)

    def on_end(self, state: TrainState) -> None:
        """Do nothing."""


class UpdateEma:
    """Hook that updates the moving average after each applied step; the loop adds it before other hooks."""

    def on_start(self, state: TrainState) -> None:
        """Do nothing."""

    def on_step(self, state: TrainState) -> None:
        """Update the average if the step was applied."""
        if state.applied and state.ema is not None:
            state.ema.update()

    def on_end(self, state: TrainState) -> None:
        """Do nothing."""


class Logging:
    """Hook that writes means every ``config.every`` steps to ``metrics.jsonl`` and the trackers, on rank 0.

    The last step of a run is always written; metrics that an interrupted run has not written are saved in its
    checkpoint.
    """

    def __init__(self, folder: Path, config: LoggingConfig, run_config: Mapping[str, Any] | None = None):
        if config.every < 1:
            raise UserError(f"logging.every={config.every}; allowed: 1 or more")
        check_trackers(config.trackers)
        self._folder, self._config, self._run_config = Path(folder), config, dict(run_config or {})
        self._file: MetricsFile | None = None
        self._trackers: list[Tracker] = []
        self._since = (0, 0.0)  # samples and seconds at the last record

    def on_start(self, state: TrainState) -> None:
        """Open the file and the trackers at the start step."""
        self._since = (state.samples, state.seconds)
        if state.accelerator.is_main_process:
            self._file = MetricsFile(self._folder / "metrics.jsonl", state.start_step)
            self._trackers = open_trackers(
                self._config.trackers, self._folder, self._config.project, self._run_config, state.start_step
            )

    def on_step(self, state: TrainState) -> None:
        """Write the step's record every ``config.every`` steps, or if a hook has logged values."""
        values: dict[str, float] = {}
        if state.step % self._config.every == 0 or state.step == state.settings.steps:
            values = state.averages()
            samples, seconds = state.samples - self._since[0], state.seconds - self._since[1]
            values["samples_per_second"] = samples / max(seconds, 1e-9)
            values["peak_memory_gib"] = peak_memory().gib
            self._since = (state.samples, state.seconds)
        self._write(state.step, values | state.take_logged())
        self._show(state.step, state.take_media())

    def on_end(self, state: TrainState) -> None:
        """Write the values that hooks logged at the end, and close the file and the trackers."""
        self._write(state.step, state.take_logged())
        self._show(state.step, state.take_media())
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        if values and self._file is not None:
            self._file.write(step, values)
            for tracker in self._trackers:
                tracker.log(step, values)

    def _show(self, step: int, files: Mapping[str, Path]) -> None:
        for tracker in self._trackers if files else ():
            tracker.log_media(step, files)


class Progress:
    """Hook that shows steps, rate, remaining time and loss in one line on rank 0's standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, state: TrainState) -> None:
        """Show the line."""
        if state.accelerator.is_main_process:
            self._bar = tqdm(
                total=state.settings.steps,
                initial=state.start_step,
                desc="training",
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def on_step(self, state: TrainState) -> None:
        """Update the line."""
        if self._bar is not None:
            skipped = f", skipped {state.skipped_steps}" if state.skipped_steps else ""
            if state.loss is not None:
                self._bar.set_postfix_str(f"loss {state.loss:.4f}{skipped}", refresh=False)
            self._bar.update(1)

    def on_end(self, state: TrainState) -> None:
        """Close the line."""
        if self._bar is not None:
            self._bar.close()


class SaveCheckpoints:
    """Hook that saves every ``every`` steps (0: never) and at the end, also of an interrupted run."""

    def __init__(self, checkpoints: Checkpoints, every: int):
        if every < 0:
            raise UserError(f"checkpoint.every={every}; allowed: 0 (only at the end), or more")
        self._checkpoints, self._every = checkpoints, every
        self._saved: int | None = None

    def on_start(self, state: TrainState) -> None:
        """Record the step of the checkpoint that was resumed from, which is not saved again."""
        self._saved = state.start_step or None

    def on_step(self, state: TrainState) -> None:
        """Save every ``every`` steps."""
        if self._every and state.step % self._every == 0:
            self._save(state)

    def on_end(self, state: TrainState) -> None:
        """Save the last step."""
        if self._saved != state.step:
            self._save(state)

    def _save(self, state: TrainState) -> None:
        snapshot = state.snapshot()
        if state.accelerator.is_main_process or snapshot.sharded:
            self._checkpoints.save(snapshot, state.accelerator)
        state.accelerator.wait_for_everyone()
        self._saved = state.step


def standard_hooks(
    folder: Path,
    logging: LoggingConfig,
    checkpoint: CheckpointConfig,
    checkpoints: Checkpoints,
    extra: Sequence[Hook] = (),
    run_config: Mapping[str, Any] | None = None,
) -> list[Hook]:
    """Return ``extra`` hooks (validation, diagnostics), followed by logging, progress and checkpoints."""
    return [
        *extra,
        Logging(folder, logging, run_config),
        Progress(),
        SaveCheckpoints(checkpoints, checkpoint.every),
    ]
