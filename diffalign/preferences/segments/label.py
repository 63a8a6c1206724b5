"""Label pairs with any labeller."""

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
        """The name that labelled rows carry."""
        ...

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return a label for each of a pair's ``count`` segments."""
        ...


@dataclass(frozen=True)
class Labelled:
    """Counts of labelled pairs and segments.

    Attributes:
        kept: pairs that were written.
        undecided: pairs that were left out, too few of their segments having a winner.
        labels: of the segments of all pairs.
        unreadable: "line: why" of pairs that were left out, one of their videos being none.
    """

    kept: int
    undecided: int
    labels: Counter[Label]
    unreadable: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line."""
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
) -> Labelled:
    """Label every pair and write ``target``, in the order of the pairs.

    Args:
        pairs: of ``read_pairs``.
        labeller: asked by ``workers`` threads.
        source: the file of the pairs.
        target: gets their rows with ``segments``, ``segment_seconds`` and the majority as ``scores``.
        seconds: of a segment.
        min_decided: pairs are left out unless a larger share of their segments has a winner; the paper trains
            on those above 0.2.
        workers: pairs that are labelled at once.
        progress: whether there is a bar.
        note: what the bar shows at its end.

    Raises:
        UserError: a setting out of range, no pair that can be read, PyAV is missing, or what the labeller
            raises. Single pairs whose videos cannot be read are left out and named.
    """
    if not seconds > 0 or not 0 <= min_decided < 1:
        raise UserError(
            f"segments of {seconds} seconds, at least {min_decided} decided; allowed: above 0; 0 to below 1"
        )
    need_av()  # otherwise every video would be unreadable
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
            pool.shutdown(cancel_futures=True)  # after an error: what is being asked ends, nothing begins
    if unreadable and len(unreadable) == len(pairs):
        raise UserError(f"{source}: none of {len(pairs)} pairs can be read; the first: {unreadable[0]}")
    write_rows(rows, source, target)
    return Labelled(len(rows), undecided, counted, tuple(unreadable))
