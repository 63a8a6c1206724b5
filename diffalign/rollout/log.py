"""The hook that logs the figures of each round to the run's metrics."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from diffalign.rollout.source import RoundReport
from diffalign.training.state import TrainState
from diffalign.utils.text import read_json_lines


@runtime_checkable
class Reporting(Protocol):
    """A source that reports figures of what it has sampled."""

    @property
    def report(self) -> RoundReport:
        """The newest round's figures."""
        ...


class RoundLog:
    """Logs a round's mean rewards, its share of ties and the images sampled, once a round.

    A resumed run reads the rounds before its checkpoint from ``metrics.jsonl``.

    Attributes:
        images: sampled so far, by all processes.
        figures: of the first round and the last one, ``first/...`` and ``last/...``, and the images.
    """

    def __init__(self, source: Reporting, metrics: Path):
        self._source, self._metrics, self._last = source, metrics, -1
        self.images = 0
        self.figures: dict[str, float] = {}

    def on_start(self, state: TrainState) -> None:
        """Read the rounds before the checkpoint."""
        for record in read_json_lines(self._metrics) if state.start_step else ():
            if record["step"] <= state.start_step and "rollout/images" in record:
                own = {k: v for k, v in record.items() if k.startswith("rollout/")}
                self._take({k: math.nan if v is None else float(v) for k, v in own.items()})

    def on_step(self, state: TrainState) -> None:
        """Log a round when the first step of it is done."""
        report = self._source.report
        if report.round == self._last:
            return
        images = float(report.images * state.accelerator.num_processes)
        figures = {**report.figures, "rollout/images": images}
        state.log(figures)
        self._take(figures)
        self._last = report.round

    def _take(self, figures: Mapping[str, float]) -> None:
        means = {k.removeprefix("rollout/"): v for k, v in figures.items() if k != "rollout/images"}
        self.images, self._last = int(figures["rollout/images"]), int(means.get("round", -1))
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
