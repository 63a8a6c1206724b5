"""Batches of what was sampled with real samples beside them: two sources that go in step."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from diffalign.rollout.source import OnlineSource, RoundReport
from diffalign.types import Batch, Source


class WithData:
    """The micro-batches of an online source, each with one of real samples beside it; a ``types.Source``."""

    def __init__(self, online: OnlineSource, data: Source[Any]):
        """Hold both; ``data`` gives finished samples with scores."""
        self._online, self._data = online, data

    @property
    def report(self) -> RoundReport:
        """The report of the newest round."""
        return self._online.report

    def seek(self, micro_step: int) -> None:
        """Continue both as if ``micro_step`` micro-batches had been drawn."""
        self._online.seek(micro_step)
        self._data.seek(micro_step)

    def __iter__(self) -> Iterator[Batch[Any]]:
        """Endless micro-batches, from where ``seek`` has put it."""
        for sampled, real in zip(self._online, self._data, strict=False):
            yield replace(sampled, beside=real)

    def close(self) -> None:
        """End whatever the judge has started."""
        self._online.close()
