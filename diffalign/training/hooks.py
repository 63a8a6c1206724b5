"""What happens around steps: logging, progress, checkpoints, and whatever a caller wants every N steps.

Hooks run on every rank and in their order; ``standard_hooks`` gives the usual ones. Hooks that add values to
a step's record (``state.log``) stand before ``Logging``; ``SaveCheckpoints`` stands last, so that what it
saves has been logged.
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
    """Called by the loop."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step, after a resumed run has been restored."""
        ...

    def on_step(self, state: TrainState) -> None:
        """After each optimizer step, ``state.step`` counting it."""
        ...

    def on_end(self, state: TrainState) -> None:
        """After the last step, also of an interrupted run; not after an error."""
        ...


@dataclass(frozen=True)
class Every:
    """Calls ``function(state)`` every ``steps`` optimizer steps (0: never), on all ranks."""

    steps: int
    function: Callable[[TrainState], None]

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Call the function when it is due."""
        if self.steps and state.step % self.steps == 0:
            self.function(state)

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""


class UpdateEma:
    """Moves the average after each step that was taken; the loop puts it first where the run keeps one."""

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Follow the parameters."""
        if state.applied and state.ema is not None:
            state.ema.update()

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""


class Logging:
    """Writes averages every ``config.every`` steps to ``<folder>/metrics.jsonl`` and the trackers, on the
    first rank.

    The last step of a run is always written; what an interrupted run had not yet written stays in its
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
        """Open the file and the trackers where the run starts."""
        self._since = (state.samples, state.seconds)
        if state.accelerator.is_main_process:
            self._file = MetricsFile(self._folder / "metrics.jsonl", state.start_step)
            self._trackers = open_trackers(
                self._config.trackers, self._folder, self._config.project, self._run_config, state.start_step
            )

    def on_step(self, state: TrainState) -> None:
        """Write the step's record when one is due, or when a hook has logged something."""
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
        """Write what hooks logged at the end, and close."""
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
    """One line with steps, rate, time left and loss, on the first rank's standard error."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, state: TrainState) -> None:
        """Draw the line."""
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
        """Move it on."""
        if self._bar is not None:
            skipped = f", skipped {state.skipped_steps}" if state.skipped_steps else ""
            if state.loss is not None:
                self._bar.set_postfix_str(f"loss {state.loss:.4f}{skipped}", refresh=False)
            self._bar.update(1)

    def on_end(self, state: TrainState) -> None:
        """Leave it standing."""
        if self._bar is not None:
            self._bar.close()


class SaveCheckpoints:
    """Saves every ``every`` steps (0: only at the end) and at the end, an interrupted one included."""

    def __init__(self, checkpoints: Checkpoints, every: int):
        if every < 0:
            raise UserError(f"checkpoint.every={every}; allowed: 0 (only at the end), or more")
        self._checkpoints, self._every = checkpoints, every
        self._saved: int | None = None

    def on_start(self, state: TrainState) -> None:
        """Note the checkpoint that was resumed from, which needs no second copy; a fresh run has none."""
        self._saved = state.start_step or None

    def on_step(self, state: TrainState) -> None:
        """Save when it is due."""
        if self._every and state.step % self._every == 0:
            self._save(state)

    def on_end(self, state: TrainState) -> None:
        """Save the end."""
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
    """Return ``extra`` hooks (validation, diagnostics), then logging, progress and checkpoints, in the order
    that they need.
    """
    return [
        *extra,
        Logging(folder, logging, run_config),
        Progress(),
        SaveCheckpoints(checkpoints, checkpoint.every),
    ]
