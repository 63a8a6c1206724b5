"""The length of a run: epochs to steps, the start line, and the expected time."""

import math
from collections.abc import Callable
from dataclasses import replace

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError
from diffalign.training.state import TrainState

MEASURED_STEPS = 10
"""Optimizer steps after which the expected time of a run is printed."""


def groups_per_step(settings: TrainingConfig, processes: int) -> int:
    """Return the number of preference groups in an optimizer step, over all processes."""
    return settings.batch_size * settings.accumulation * processes


def scheduled(settings: TrainingConfig, groups: int | None, processes: int) -> TrainingConfig:
    """Return ``settings`` with ``epochs`` turned into ``steps``, the last one rounded up.

    Args:
        settings: the loop's.
        groups: preference groups that are trained on; None: an online source.
        processes: number of ranks.

    Raises:
        UserError: epochs of an online source, which has no end.
    """
    if settings.epochs is None:
        return settings
    if groups is None:
        raise UserError(
            f"training.epochs={settings.epochs} with rollout.prompts: what a policy samples has no epochs; "
            "allowed: null, with training.steps"
        )
    steps = math.ceil(settings.epochs * groups / groups_per_step(settings, processes))
    return replace(settings, steps=max(1, steps))


def announcement(settings: TrainingConfig, groups: int | None, processes: int, done: int = 0) -> str:
    """Return the start line: steps, those ``done`` before a resume, and epochs of how many groups."""
    step = groups_per_step(settings, processes)
    line = f"training: {_counted(settings.steps, 'step')} of {_counted(step, 'group')}"
    if done >= settings.steps:
        return f"{line}: nothing is left to train, the checkpoint is of step {done:,}"
    line += f", from step {done:,} on" if done else ""
    if groups is None:
        return line
    epochs = settings.steps * step / groups
    many = "epoch" if epochs == 1 else "epochs"
    return f"{line}, {epochs:,.3g} {many} of {_counted(groups, 'group')}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Return a time in words: hours from one hour on, else minutes, else seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


class Forecast:
    """The hook that prints the expected time of the run once, measured on its first steps.

    The first step is left out, since it compiles and allocates.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell, self._start, self._first = tell, 0, 0.0

    def on_start(self, state: TrainState) -> None:
        """Note the step at which this process starts."""
        self._start = state.step

    def on_step(self, state: TrainState) -> None:
        """Print the expected time after a few steps."""
        done = state.step - self._start
        if done == 1:
            self._first = state.seconds
        if done == MEASURED_STEPS and state.settings.steps > state.step:
            pace = (state.seconds - self._first) / (done - 1)
            left = state.settings.steps - state.step
            self._tell(
                f"expected: {duration(pace * state.settings.steps)} for all {state.settings.steps:,} steps, "
                f"{duration(pace * left)} to go, at {pace:.3g} s a step"
            )

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""
