"""The hook that logs the figures of each round to the run's metrics."""

from typing import Protocol, runtime_checkable

from diffalign.rollout.source import RoundReport
from diffalign.training.state import TrainState


@runtime_checkable
class Reporting(Protocol):
    """A source that reports figures of what it has sampled."""

    @property
    def report(self) -> RoundReport:
        """The newest round's figures."""
        ...


class RoundLog:
    """Logs a round's mean rewards, its share of ties and the images sampled, once a round.

    Attributes:
        images: sampled so far, by all processes.
        figures: of the first round and the last one, ``first/...`` and ``last/...``, and the images.
    """

    def __init__(self, source: Reporting):
        self._source, self._last = source, -1
        self.images = 0
        self.figures: dict[str, float] = {}

    def on_start(self, state: TrainState) -> None:
        """Nothing to prepare."""

    def on_step(self, state: TrainState) -> None:
        """Log a round when the first step of it is done."""
        report = self._source.report
        if report.round == self._last:
            return
        self._last = report.round
        self.images = report.images * state.accelerator.num_processes
        state.log({**report.figures, "rollout/images": float(self.images)})
        means = {k.removeprefix("rollout/"): v for k, v in report.figures.items()}
        if not self.figures:
            self.figures = {f"first/{name}": value for name, value in means.items()}
        self.figures |= {f"last/{name}": value for name, value in means.items()}
        self.figures["images"] = float(self.images)

    def on_end(self, state: TrainState) -> None:
        """Nothing to finish."""

    @property
    def verdict(self) -> str:
        """Return the mean rewards of the first and the last round as a sentence."""
        names = [name.removeprefix("first/") for name in self.figures if name.startswith("first/")]
        changes = [
            f"{name} {self.figures[f'first/{name}']:.4g} to {self.figures[f'last/{name}']:.4g}"
            for name in names
            if name not in ("round", "ties")
        ]
        if not names:
            return "no round was learnt from"
        if not changes:
            return f"{self.figures['last/round']:.0f} rounds after the first, without a reward that watches"
        rounds = f"round {self.figures['first/round']:.0f} to {self.figures['last/round']:.0f}"
        return f"mean rewards of the samples, {rounds}: {', '.join(changes)}"
