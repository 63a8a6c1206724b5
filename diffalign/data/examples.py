"""Preferences as they are read: groups of images of one prompt, each with a score.

A pair is a group of two with scores (1, 0); a tie is (0.5, 0.5) and stays one; nothing is preferred by its
position. Images are held as encoded bytes or as a path and are decoded when they are needed.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from diffalign.randomness import derive


@dataclass(frozen=True)
class ImageRef:
    """An image file: its encoded bytes, or where they lie."""

    source: bytes | Path = field(repr=False)

    def read(self) -> bytes:
        """The bytes of the image file; OSError where it cannot be read."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


def digest(*parts: bytes) -> str:
    """The content's name: 128 bits of BLAKE2b in hexadecimal."""
    hasher = blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


@dataclass(frozen=True)
class Example:
    """A group: K images of one prompt.

    Attributes:
        prompt: what the images were made for.
        images: K of them; two for a pair, one for a like, more for a list.
        scores: K numbers, higher is better; equal numbers are a tie.
        where: the place to name in a message, such as "pairs.parquet row 17" (rows count from 0).
    """

    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]
    where: str

    @property
    def is_tie(self) -> bool:
        """Whether no image is better than another."""
        return len(self.scores) > 1 and min(self.scores) == max(self.scores)


@dataclass(frozen=True)
class Skipped:
    """A row that gives no example: why, and where."""

    reason: str
    where: str
    unlabelled: bool = False  # otherwise it could not be read


@dataclass(frozen=True)
class Counts:
    """What a set held.

    Attributes:
        usable: groups with something to prefer; ties are not among them.
        ties: groups without a winner, which are kept and weigh nothing.
        unlabelled: rows without a label, dropped.
        unreadable: rows whose images or prompt could not be read, dropped.
        skipped: "place: reason" of each unreadable row.
    """

    usable: int = 0
    ties: int = 0
    unlabelled: int = 0
    unreadable: int = 0
    skipped: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line: "7 pairs, 1 tie, 1 row without label, 0 unreadable"."""
        plural = lambda n: "" if n == 1 else "s"  # noqa: E731
        return (
            f"{self.usable} pair{plural(self.usable)}, {self.ties} tie{plural(self.ties)}, "
            f"{self.unlabelled} row{plural(self.unlabelled)} without label, {self.unreadable} unreadable"
        )


def count(items: Iterable[Example | Skipped]) -> Counts:
    """Counts of examples and skipped rows."""
    usable = ties = unlabelled = 0
    skipped: list[str] = []
    for item in items:
        if isinstance(item, Skipped):
            unlabelled += item.unlabelled
            if not item.unlabelled:
                skipped.append(f"{item.where}: {item.reason}")
        else:
            ties += item.is_tie
            usable += not item.is_tie
    return Counts(usable, ties, unlabelled, len(skipped), tuple(skipped))


def turn_labels(example: Example) -> Example:
    """The example with its order turned round; its own inverse, ties unchanged."""
    top = max(example.scores) + min(example.scores)
    return Example(
        example.prompt, example.images, tuple(top - score for score in example.scores), example.where
    )


def turn_share(example: Example, share: float, seed: int) -> Example:
    """The example, turned round if it falls into the share that is drawn by seed and content."""
    if share <= 0:
        return example
    if share < 1:
        try:
            content = digest(example.prompt.encode(), *(image.read() for image in example.images))
        except OSError:  # the encoder will find it unreadable, and name it
            return example
        if derive(seed, "flip_labels", content) >= share * 2**63:
            return example
    return turn_labels(example)


class Preferences:
    """A preference set: an iterable of Examples that can be walked again, read as it is walked.

    Attributes:
        name: what the user called it.
        total: the number of rows if it is known without reading, else None (a progress bar's length).
        fingerprint: changes whenever the set may have changed; None if that cannot be told without reading
            it.
        counts: what the last complete pass found. Images are not opened by a pass, so ``unreadable`` holds
            rows without a prompt or an image only; the counts of an encoded set are the final ones.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterator[Example | Skipped]],
        total: int | None,
        fingerprint: str | None,
    ):
        self.name = name
        self.total = total
        self.fingerprint = fingerprint
        self.counts = Counts()
        self._rows = rows

    def rows(self) -> Iterator[Example | Skipped]:
        """Every row, with the ones that give no example."""
        return self._rows()

    def __iter__(self) -> Iterator[Example]:
        seen: list[Skipped] = []
        usable = ties = 0
        for item in self._rows():
            if isinstance(item, Skipped):
                seen.append(item)
                continue
            ties += item.is_tie
            usable += not item.is_tie
            yield item
        counts = count(seen)
        self.counts = Counts(usable, ties, counts.unlabelled, counts.unreadable, counts.skipped)
