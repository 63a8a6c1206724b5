"""Summary of a preference set for ``diffalign data``: counts, sizes, labels, prompts, duplicates."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from diffalign.data.prompts.prompt_syntax import empty_note, syntax_note
from diffalign.data.reading.examples import Counts, Example, Kind, Preferences, Skipped, count, digest
from diffalign.media.images import UNREADABLE, has_further_frames, note_on_frames, opened, why_unreadable
from diffalign.media.videos import probe

Size = tuple[int, int]
"""(width, height) in pixels."""

_SHAPES = (("landscape", 1.1, 1e9), ("square", 1 / 1.1, 1.1), ("portrait", 0.0, 1 / 1.1))
_MARGINS = (0.0, 0.25, 0.5, 0.75, 1.0)  # quantiles
_ORIENTATION = 0x0112  # EXIF tag; its values from 5 on exchange height and width


@dataclass(frozen=True)
class Tokens:
    """Lengths of prompts by one tokenizer.

    Attributes:
        name: of the tokenizer in its pipeline.
        limit: tokens that it keeps; None: no limit.
        longest: tokens of the longest prompt.
        cut: prompts that are longer than the limit and are cut off.
    """

    name: str
    limit: int | None
    longest: int
    cut: int


@dataclass(frozen=True)
class Summary:
    """The numbers of a preference set.

    Attributes:
        name: as the user named it.
        schema: of its columns.
        notes: on unused data, prompts that are written for other programs, and images of several frames.
        counts: groups by kind and rows that were dropped, unreadable and identical images included.
        sizes: (width, height) of the images with counts, the most frequent first.
        aspects: images by shape: landscape, square, portrait.
        first_better: number of pairs that prefer the first image, and of all pairs with a winner.
        margins: quantiles 0, 1/4, 1/2, 3/4 and 1 of the score differences of pairs with a winner; () without.
        votes: groups with votes, and the mean of their larger share; None without votes.
        prompts: number of prompts, and of different ones.
        words: median and largest number of words of a prompt.
        tokens: of each given tokenizer.
        repeated_images: files that occur in several groups.
        repeated_pairs: pairs of the same prompt and images as an earlier pair.
        contradictions: pairs of the same prompt and images, each counted once, that some row labels one way
            and another row the other way.
        shared: number of different prompts that an evaluation set also has, by its name.
        shown: the first groups, for a page.
    """

    name: str
    schema: str
    notes: tuple[str, ...]
    counts: Counts
    sizes: tuple[tuple[Size, int], ...]
    aspects: Mapping[str, int]
    first_better: tuple[int, int]
    margins: tuple[float, ...]
    votes: tuple[int, float] | None
    prompts: tuple[int, int]
    words: tuple[float, int]
    tokens: tuple[Tokens, ...]
    repeated_images: int
    repeated_pairs: int
    contradictions: int
    shared: Mapping[str, int]
    shown: tuple[Example, ...] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        kinds = (
            "usable",
            "ties",
            "lists",
            "captions",
            "liked",
            "disliked",
            "unlabelled",
            "unreadable",
            "identical",
        )
        better, pairs = self.first_better
        return {
            "data": self.name,
            "schema": self.schema,
            "notes": list(self.notes),
            "counts": {name: getattr(self.counts, name) for name in (*kinds, "undecided")},
            "unreadable": list(self.counts.skipped),
            "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in self.sizes],
            "aspects": dict(self.aspects),
            "first_better": {"pairs": pairs, "first": better},
            "margin_quantiles": list(self.margins),
            "votes": None
            if self.votes is None
            else {"groups": self.votes[0], "mean_agreement": self.votes[1]},
            "prompts": {"all": self.prompts[0], "different": self.prompts[1]},
            "words": {"median": self.words[0], "longest": self.words[1]},
            "tokens": [vars(one) for one in self.tokens],
            "repeated_images": self.repeated_images,
            "repeated_pairs": self.repeated_pairs,
            "contradictions": self.contradictions,
            "shared_prompts": dict(self.shared),
        }


def summarise(
    preferences: Preferences,
    tokenizers: Mapping[str, tuple[Callable[[str], int], int | None]] | None = None,
    evaluation: Mapping[str, Collection[str]] | None = None,
    videos: bool = False,
    shown: int = 10,
    each: Callable[[Iterator[Example | Skipped]], Iterator[Example | Skipped]] = iter,
) -> Summary:
    """Read a whole set, its images' headers included.

    Args:
        preferences: the set.
        tokenizers: (number of tokens of a text, limit) by name.
        evaluation: prompts by the name of the set that they are evaluated on.
        videos: whether the files are videos.
        shown: groups to keep for a page.
        each: wraps the rows, for a progress bar.
    """
    seen = _Seen(videos, shown)
    for row in each(preferences.rows()):
        seen.add(row)
    different = set(seen.prompts)
    words = [len(prompt.split()) for prompt in different]
    named = {normal(prompt): prompt for prompt in different}
    return Summary(
        preferences.name,
        preferences.schema,
        (*preferences.notes, *filter(None, _notes(seen))),
        count(seen.skipped).of(seen.kinds),
        tuple(seen.sizes.most_common()),
        {
            name: sum(n for (w, h), n in seen.sizes.items() if low < w / h <= high)
            for name, low, high in _SHAPES
        },
        (seen.first, len(seen.gaps)),
        quantiles(seen.gaps),
        (len(seen.agreement), sum(seen.agreement) / len(seen.agreement)) if seen.agreement else None,
        (len(seen.prompts), len(different)),
        (float(median(words)) if words else 0.0, max(words, default=0)),
        tuple(_tokens(name, *one, different) for name, one in (tokenizers or {}).items()),
        sum(n > 1 for n in seen.contents.values()),
        sum(sum(winners.values()) - 1 for winners in seen.pairs.values()),
        sum(len(winners) > 1 for winners in seen.pairs.values()),
        {name: len(named.keys() & set(map(normal, texts))) for name, texts in (evaluation or {}).items()},
        tuple(seen.shown),
    )


def normal(prompt: str) -> str:
    """Return a prompt in a form for comparison: case, spaces and the last full stop do not count."""
    return " ".join(prompt.casefold().split()).rstrip(".")


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """Return the quantiles 0, 1/4, 1/2, 3/4 and 1, each an occurring value; () for no values."""
    ordered = sorted(values)
    return tuple(ordered[round(share * (len(ordered) - 1))] for share in _MARGINS) if ordered else ()


def _tokens(name: str, length: Callable[[str], int], limit: int | None, prompts: Collection[str]) -> Tokens:
    lengths = [length(prompt) for prompt in prompts]
    return Tokens(name, limit, max(lengths, default=0), sum(limit is not None and n > limit for n in lengths))


def _notes(seen: "_Seen") -> list[str]:
    """Return what is unusual in prompts and files; "" for what is not there."""
    return [empty_note(seen.prompts), syntax_note(seen.prompts), note_on_frames(seen.animated)]


class _Seen:
    """What has been read so far."""

    def __init__(self, videos: bool, most: int):
        self.videos, self.most = videos, most
        self.skipped: list[Skipped] = []
        self.kinds: list[Kind] = []
        self.prompts: list[str] = []
        self.sizes: Counter[Size] = Counter()
        self.contents: Counter[str] = Counter()
        self.animated: dict[str, None] = {}  # names in order
        self.pairs: dict[tuple[str, frozenset[str]], Counter[str]] = {}
        self.gaps: list[float] = []
        self.agreement: list[float] = []
        self.first = 0
        self.shown: list[Example] = []

    def add(self, row: Example | Skipped) -> None:
        """Count a row."""
        if isinstance(row, Skipped):
            self.skipped.append(row)
            return
        files: list[tuple[str, Size]] = []
        for at, image in enumerate(row.images):
            try:
                content = image.read()
                files.append((digest(content), self._size(content)))
                if not self.videos and has_further_frames(content):
                    self.animated[image.name or f"image {at} of {row.where}"] = None
            except UNREADABLE as error:
                why = f"{image.name or f'image {at}'} is unreadable ({why_unreadable(error)})"
                self.skipped.append(Skipped(why, row.where))
                return
        names = {name for name, _ in files}
        if len(files) > 1 and len(names) == 1 and not row.prompts:
            self.skipped.append(Skipped("its images are identical", row.where, "identical"))
            return
        self.contents.update(names)
        self.sizes.update(size for _, size in files)
        self.kinds.append(row.kind)
        self.prompts.append(row.prompt)
        if row.votes:
            self.agreement.append(max(row.votes))
        if row.kind == "pair":
            self.gaps.append(abs(row.scores[0] - row.scores[1]) if row.scores else 0.0)
            first = bool(row.scores) and row.scores[0] > row.scores[1]
            self.first += first
            if row.scores and not row.prompts:
                winner = files[0 if first else 1][0]
                self.pairs.setdefault((normal(row.prompt), frozenset(names)), Counter())[winner] += 1
        if len(self.shown) < self.most:
            self.shown.append(row)

    def _size(self, content: bytes) -> Size:
        if self.videos:
            found = probe(content)
            return found.width, found.height
        with opened(content) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5
            width, height = image.size
        return (height, width) if turned else (width, height)
