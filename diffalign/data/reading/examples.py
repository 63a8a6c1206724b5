"""Examples: groups of images of one prompt, each with a score, as they are read.

A pair is a group of two with scores (1, 0); a tie is (0.5, 0.5) and stays one; a ranked list is a group of
any size; a like is a group of one, scored 1 or 0; a caption pair is one image twice, under two prompts.
The order of a group has no meaning. Images are encoded bytes or paths and are decoded when they are needed.
Videos may replace images; they may also have dense labels, a score for each segment of time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from diffalign.data.reading.dense import Dense, Segments, is_dense_tie, turn_segments
from diffalign.data.reading.references import ImageRef as ImageRef
from diffalign.data.reading.references import MissingFileError as MissingFileError
from diffalign.data.reading.references import digest as digest
from diffalign.diffusion.randomness import derive


@dataclass(frozen=True)
class Example:
    """A group: K images of one prompt, or one image under K prompts.

    Attributes:
        prompt: what the images were made for.
        images: K of them; two for a pair, one for a like, more for a list.
        scores: K numbers, higher is better; equal numbers are a tie, and a single image is liked (1) or not
            (0). Empty where rewards are to give them.
        where: its place for messages, such as "pairs.parquet row 17" (rows count from 0).
        prompts: K of them where each image has its own (text preference), else none.
        rewards: K rows of R rewards, else none.
        patches: K weight maps or None each, else none.
        weight: of the group.
        turned: whether the labels were flipped.
        segments: of videos, K rows of S scores, one for each segment of time (NaN: no label), else none.
        segment_seconds: of each segment; None: ``data.segment_seconds``.
        votes: K shares of the people who preferred each image, summing to 1, else none. Of a pair
            P(0 > 1) = votes[0].
        source: the image that all of them were made from, by the prompt; None: they were made from nothing.
        time_labels: for each of equal intervals of time from 0 (data) to 1 whether the label holds there: 1,
            -1 (turned round) or 0 (left out); else none, and it holds everywhere.
    """

    prompt: str
    images: tuple[ImageRef, ...]
    scores: tuple[float, ...]
    where: str
    prompts: tuple[str, ...] = ()
    rewards: tuple[tuple[float, ...], ...] = ()
    patches: tuple[ImageRef | None, ...] = ()
    weight: float = 1.0
    turned: bool = False
    segments: Segments = ()
    segment_seconds: float | None = None
    votes: tuple[float, ...] = ()
    source: ImageRef | None = None
    time_labels: tuple[int, ...] = ()

    @property
    def is_tie(self) -> bool:
        """Whether no image is better than another, at any time."""
        return is_tie(self.scores, self.segments)

    @property
    def kind(self) -> "Kind":
        """What the group counts as."""
        return kind_of(self.scores, len(self.images), bool(self.prompts), self.segments)


Kind = Literal["pair", "list", "caption", "liked", "disliked", "tie"]


def is_tie(scores: Sequence[float], segments: Segments = ()) -> bool:
    """Whether several scores are all equal; where there are dense ones, those of every segment."""
    return is_dense_tie(segments) if segments else len(scores) > 1 and min(scores) == max(scores)


def kind_of(scores: Sequence[float], images: int, captioned: bool, segments: Segments = ()) -> Kind:
    """Return the kind of a group in counts: ties of all kinds are ties; a caption pair has one prompt for
    each image."""
    if is_tie(scores, segments):
        return "tie"
    if images == 1:
        return "liked" if scores and scores[0] > 0 else "disliked"
    if captioned:
        return "caption"
    return "pair" if images == 2 else "list"


@dataclass(frozen=True)
class Skipped:
    """A row without an example: the reason and the place.

    ``cause`` is "unlabelled", "unaltered" (a caption without a word to change), "identical" (one image twice,
    or marked so), "undecided" (of weight 0, or votes below ``data.min_agreement``), or else it could
    not be read.
    """

    reason: str
    where: str
    cause: Literal["unreadable", "unlabelled", "unaltered", "identical", "undecided"] = "unreadable"


@dataclass(frozen=True)
class Counts:
    """The counts of a set.

    Attributes:
        usable: groups with a preference, without ties.
        ties: groups without a winner, which are kept with weight 0.
        unlabelled: rows without a label, dropped.
        unreadable: rows whose images or prompt could not be read, dropped.
        skipped: "place: reason" of each unreadable row.
        lists: usable groups of more than two; the next three are of the usable ones too.
        captions: an image under two captions.
        liked: single images that are liked.
        disliked: single images that are not liked.
        unaltered: rows whose caption has no word to change, dropped.
        segments: segments of time with their own label.
        tied: segments without a winner, unlabelled ones included.
        missing: those without a label.
        beyond: labels after a clip's end, left out.
        identical: groups of one and the same image, dropped.
        undecided: groups of weight 0, or whose votes agree less than ``data.min_agreement``, dropped.
        filtered: (filter, groups that it left out) of each of ``data.filters``, not among the above.
    """

    usable: int = 0
    ties: int = 0
    unlabelled: int = 0
    unreadable: int = 0
    skipped: tuple[str, ...] = ()
    lists: int = 0
    captions: int = 0
    liked: int = 0
    disliked: int = 0
    unaltered: int = 0
    segments: int = 0
    tied: int = 0
    missing: int = 0
    beyond: int = 0
    identical: int = 0
    undecided: int = 0
    filtered: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """One line: "7 pairs, 1 tie, 1 row without label, 0 unreadable"; of single images "5 liked and 3
        disliked images", or "8 demonstrations" where none is disliked.
        """
        singles = self.liked + self.disliked
        pairs = self.usable - self.lists - self.captions - singles
        parts = [_some(pairs, "pair")] if pairs or not self.usable else []
        parts += [_some(n, what) for n, what in ((self.lists, "list"), (self.captions, "caption pair")) if n]
        if self.disliked:
            parts.append(f"{self.liked} liked and {self.disliked} disliked images")
        elif self.liked:
            parts.append(_some(self.liked, "demonstration"))
        if self.ties or self.usable != singles or not singles:
            parts.append(_some(self.ties, "tie"))
        if self.segments:
            parts.append(self._in_time)
        parts.append(f"{_some(self.unlabelled, 'row')} without label")
        if self.unaltered:
            parts.append(f"{_some(self.unaltered, 'caption')} without a word to change")
        if self.identical:
            parts.append(f"{self.identical} of identical images left out")
        if self.undecided:
            parts.append(f"{self.undecided} of weight 0 or below data.min_agreement left out")
        parts.append(f"{self.unreadable} unreadable")
        parts += [f"{number} left out by data.filters ({name})" for name, number in self.filtered]
        return ", ".join(parts)

    @property
    def _in_time(self) -> str:
        """Such as "12 segments, 3 of them tied (1 for want of a label), 2 beyond the end left out"."""
        text = f"{_some(self.segments, 'segment')}, {self.tied} of them tied"
        text += f" ({self.missing} for want of a label)" if self.missing else ""
        return text + (f", {self.beyond} beyond the end left out" if self.beyond else "")

    def of(self, kinds: Iterable[Kind], dense: Iterable[Dense] = ()) -> "Counts":
        """Return these counts of dropped rows with the groups counted anew."""
        held, labels = Counter(kinds), list(dense)
        return replace(
            self,
            usable=held.total() - held["tie"],
            ties=held["tie"],
            lists=held["list"],
            captions=held["caption"],
            liked=held["liked"],
            disliked=held["disliked"],
            segments=sum(len(label.scores[0]) for label in labels),
            tied=sum(label.tied for label in labels),
            missing=sum(label.missing for label in labels),
            beyond=sum(label.beyond for label in labels),
        )


def _some(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def count(skipped: Iterable[Skipped]) -> Counts:
    """Return counts of skipped rows."""
    skipped = list(skipped)
    causes = Counter(item.cause for item in skipped)
    named = tuple(f"{item.where}: {item.reason}" for item in skipped if item.cause == "unreadable")
    return Counts(
        unlabelled=causes["unlabelled"],
        unreadable=len(named),
        skipped=named,
        unaltered=causes["unaltered"],
        identical=causes["identical"],
        undecided=causes["undecided"],
    )


def turn_scores(scores: tuple[float, ...]) -> tuple[float, ...]:
    """Return the scores in reverse order, ties unchanged; of a single image, liked becomes not liked."""
    if len(scores) == 1:
        return (1.0 - scores[0],)
    return tuple(max(scores) + min(scores) - score for score in scores)  # of no scores, no scores


def turn_labels(example: Example) -> Example:
    """Return the example with flipped labels, ties unchanged; flipping twice restores it."""
    scores, segments = turn_scores(example.scores), turn_segments(example.segments)
    votes = turn_scores(example.votes) if example.votes else ()
    return replace(example, scores=scores, segments=segments, turned=not example.turned, votes=votes)


def turn_share(example: Example, share: float, seed: int) -> Example:
    """Return the example, with flipped labels if it is in the share that is drawn by seed and content."""
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
    """A preference set: an iterable of Examples, read lazily, which may be iterated repeatedly.

    Attributes:
        name: as the user named it.
        total: the number of rows if it is known without reading, else None (a progress bar's length).
        fingerprint: changes whenever the set may have changed; None if that is unknown without reading the
            set.
        counts: of the last complete pass. Images are not opened by a pass, so ``unreadable`` holds
            rows without a prompt or an image only; the counts of an encoded set are the final ones.
        schema: the name of the schema that the columns follow; "" for a folder.
        notes: sentences on unused data.
    """

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterator[Example | Skipped]],
        total: int | None,
        fingerprint: str | None,
        *,
        each: Callable[[Example], Example | Skipped] = lambda example: example,
        schema: str = "",
        notes: Sequence[str] = (),
    ):
        """``rows`` reads the set; ``each`` then transforms an example, in any thread."""
        self.name = name
        self.total = total
        self.fingerprint = fingerprint
        self.counts = Counts()
        self.schema = schema
        self.notes = tuple(notes)
        self.unfinished = rows
        self._each = each

    def finish(self, row: Example | Skipped) -> Example | Skipped:
        """Return a finished row of ``unfinished``: the slow part, which threads may run in advance."""
        return row if isinstance(row, Skipped) else self._each(row)

    def rows(self) -> Iterator[Example | Skipped]:
        """Every row, with the ones that give no example."""
        return map(self.finish, self.unfinished())

    def __iter__(self) -> Iterator[Example]:
        skipped: list[Skipped] = []
        kinds: list[Kind] = []
        for item in self.rows():
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            kinds.append(item.kind)
            yield item
        self.counts = count(skipped).of(kinds)
