"""Label the segments of pairs with any labeller, and write the labelled pairs."""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.media.videos import need_av
from diffalign.preferences.segments.pairs import (
    Label,
    Pair,
    UnreadableError,
    decided,
    with_labels,
    write_rows,
)


@runtime_checkable
class Labeller(Protocol):
    """A labeller of segments."""

    @property
    def by(self) -> str:
        """The labeller's name, which is written to labelled rows."""
        ...

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return one label for each of a pair's ``count`` segments."""
        ...


@dataclass(frozen=True)
class LabelCounts:
    """Counts of labelled pairs and segments.

    Attributes:
        kept: number of written pairs.
        undecided: number of pairs left out because too few of their segments have a winner.
        labels: counts of labels over the segments of all pairs.
        unreadable: location and reason of each pair left out because a video cannot be read.
    """

    kept: int
    undecided: int
    labels: Counter[Label]
    unreadable: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The counts in one line."""
        counts = {name: self.labels[name] for name in ("first", "second", "tie")}
        text = ", ".join(f"{number} {name}" for name, number in counts.items())
        text += f", {self.labels[None]} without label" if self.labels[None] else ""
        left = f"; {self.undecided} left out as undecided" if self.undecided else ""
        return f"{self.kept} pairs{left}; segments: {text}"


def label_pairs(
    pairs: Sequence[Pair],
    labeller: Labeller,
    source: str,
    target: Path,
    *,
    seconds: float = 1.0,
    min_decided: float = 0.0,
    workers: int = 1,
    progress: bool = True,
    note: Callable[[], str] | None = None,
) -> LabelCounts:
    """Label every pair and write ``target``, in the order of the pairs.

    Pairs with an unreadable video are left out and reported.

    Args:
        pairs: see ``read_pairs``.
        labeller: the labeller; ``workers`` threads call it.
        source: the file of the pairs.
        target: file to write: the rows with ``segments``, ``segment_seconds`` and the majority as ``scores``.
        seconds: length of a segment, in seconds.
        min_decided: share of segments with a winner that a written pair must exceed; 0 writes all. The paper
            trains on pairs above 0.2.
        workers: number of pairs that are labelled concurrently.
        progress: whether to show a progress bar.
        note: returns text for the end of the progress bar.

    Raises:
        UserError: a setting out of range, no readable pair, PyAV is not installed, or the labeller's error.
    """
    if not seconds > 0 or not 0 <= min_decided < 1:
        raise UserError(
            f"segments of {seconds} seconds, at least {min_decided} decided; allowed: above 0; 0 to below 1"
        )
    need_av()  # else every video would count as unreadable
    counted, rows, undecided = Counter[Label](), [], 0
    unreadable: list[str] = []
    bar = tqdm(total=len(pairs), desc="labels", unit="pair", disable=not progress)
    with bar, ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(lambda pair: labeller(pair, pair.segments(seconds)), pair) for pair in pairs]
        try:
            for pair, done in zip(pairs, waiting, strict=True):
                try:
                    labels = done.result()
                except UnreadableError as error:
                    unreadable.append(f"{pair.where}: {error}")
                    continue
                counted.update(labels)
                if decided(labels) > min_decided or not min_decided:
                    rows.append(with_labels(pair, labels, seconds, labeller.by))
                else:
                    undecided += 1
                bar.set_postfix_str(note() if note else "")
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, pending pairs are not started
    if unreadable and len(unreadable) == len(pairs):
        raise UserError(f"{source}: none of {len(pairs)} pairs can be read; the first: {unreadable[0]}")
    write_rows(rows, source, target)
    return LabelCounts(len(rows), undecided, counted, tuple(unreadable))
