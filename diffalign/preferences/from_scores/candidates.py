"""Candidates of pairs: images or videos with scores, computed here or read from a ``diffalign score`` table.

Embedded images are copied to a temporary file while the source is read, so that it need not fit in memory.
"""

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.data.reading.json_files import json_rows
from diffalign.errors import UserError, unknown
from diffalign.media.images import UNREADABLE, decode, read_file, why_unreadable
from diffalign.preferences.from_scores.likeness import Thumbnail, thumbnail
from diffalign.rewards.scoring.cache import ScoreCache, image_key
from diffalign.rewards.scoring.items import Item, has_media, read_items
from diffalign.rewards.scoring.score import Scorer, Unreadable, each_scored, none_readable


@dataclass(frozen=True)
class Stored:
    """The place of an encoded image in a ``MediaStore``: offset and length in bytes."""

    offset: int
    length: int


class MediaStore:
    """Encoded images in one temporary file, which is deleted on closing."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)

    def __enter__(self) -> "MediaStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> Stored:
        """Append bytes and return their place."""
        offset = self._file.seek(0, 2)
        self._file.write(data)
        return Stored(offset, len(data))

    def read(self, media: Stored | Path) -> bytes:
        """Return stored bytes, or the content of a file; OSError if the file cannot be read."""
        if isinstance(media, Path):
            return read_file(media)
        self._file.seek(media.offset)
        return self._file.read(media.length)


@dataclass(frozen=True)
class Candidate:
    """One image or video with its scores.

    Attributes:
        prompt: its prompt; candidates of one prompt are rivals.
        media: its file, or its place in the store.
        content: digest of the encoded bytes.
        scores: R scores, one a reward.
        is_video: whether it is a video.
        small: thumbnail for the search of near duplicates; None if they are not searched.
    """

    prompt: str
    media: Path | Stored
    content: str
    scores: tuple[float, ...]
    is_video: bool = False
    small: Thumbnail | None = None


@dataclass(frozen=True)
class Candidates:
    """The candidates of a source.

    Attributes:
        candidates: the candidates, in the order of the source.
        rewards: names of the R rewards.
        unreadable: location and reason of each unreadable item.
    """

    candidates: tuple[Candidate, ...]
    rewards: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


def scored_now(
    items: Iterable[Item],
    scorers: Sequence[Scorer],
    cache: ScoreCache | None,
    store: MediaStore,
    *,
    near: bool = False,
    progress: bool = True,
) -> Candidates:
    """Score items and return them as candidates.

    Args:
        items: see ``rewards.scoring.items.read_items``.
        scorers: rewards to score with.
        cache: cache of scores; None: none.
        store: receives embedded images.
        near: whether to compute thumbnails for the search of near duplicates.
        progress: whether to show a progress bar.

    Raises:
        UserError: no items, no readable item, or an input that a reward refuses.
    """
    candidates, unreadable = [], []
    for entry in each_scored(items, scorers, cache, progress):
        if isinstance(entry, Unreadable):
            unreadable.append(entry)
        else:
            data = entry.item.read()
            candidates.append(_candidate(entry.item, data, entry.content, entry.scores, store, near))
    if not candidates:
        raise UserError(none_readable(unreadable))
    names = tuple(scorer.name for scorer in scorers)
    return Candidates(tuple(candidates), names, tuple(entry.text for entry in unreadable))


def is_score_table(path: Path) -> bool:
    """Return whether a file is a table of ``diffalign score`` (files, prompts and scores without images)."""
    if path.suffix == ".jsonl" and path.is_file():
        first = next(iter(_rows(path)), {})
        columns: Sequence[str] = list(first)
    elif path.suffix == ".parquet" and path.is_file():
        columns = _parquet(path).schema_arrow.names
    else:
        return False
    return {"file", "prompt"} <= set(columns) and not has_media(columns)


def from_table(
    path: Path, rewards: Sequence[str], store: MediaStore, *, limit: int | None = None, near: bool = False
) -> Candidates:
    """Read candidates from a table of scores; the table's image files must still exist.

    Args:
        path: the table.
        rewards: names of the rewards to use; empty: all of the table.
        store: receives embedded images.
        limit: largest number of images, from the first on; None: all.
        near: whether to compute thumbnails for the search of near duplicates.

    Raises:
        UserError: missing scores, a source that is missing or has changed, or no readable image.
    """
    entries: list[tuple[Candidate, Mapping[str, float], str]] = []
    unreadable: list[str] = []
    for row, item in islice(_with_items(path), limit):
        try:
            data = item.read()
            if not item.is_video:  # the file may have been damaged since it was scored
                decode(data)
            candidate = _candidate(item, data, image_key(data), (), store, near)
        except UNREADABLE as error:
            unreadable.append(f"{item.where}: {why_unreadable(error)}")
        else:
            entries.append((candidate, _scores(row, item.suffix), item.where))
    available = list(dict.fromkeys(name for _, scores, _ in entries for name in scores))
    if entries and not available:
        raise UserError(f"{path}: no scores in it; `diffalign score` writes such tables")
    names = tuple(rewards or available)
    candidates = []
    for candidate, scores, where in entries:
        if missing := [name for name in names if name not in scores]:
            if missing[0] not in available:
                raise unknown(f"reward of {path}", missing[0], available)
            unreadable.append(f"{where}: no finite score by {missing[0]}")
        else:
            candidates.append(replace(candidate, scores=tuple(scores[name] for name in names)))
    if not candidates:
        raise UserError(
            f"{path}: no image with a score in it" + (f"; the first: {unreadable[0]}" if unreadable else "")
        )
    return Candidates(tuple(candidates), names, tuple(unreadable))


def _candidate(
    item: Item, data: bytes, content: str, scores: tuple[float, ...], store: MediaStore, near: bool
) -> Candidate:
    """Return the candidate of an item; raises one of UNREADABLE if a thumbnail cannot be computed."""
    small = thumbnail(data) if near and not item.is_video else None
    media = item.image if isinstance(item.image, Path) else store.add(data)
    return Candidate(item.prompt, media, content, scores, item.is_video, small)


def _scores(row: Mapping[str, Any], suffix: str) -> dict[str, float]:
    """Return the finite scores by reward, from the columns with this suffix."""
    return {
        column.removesuffix(suffix): value
        for column, value in row.items()
        if isinstance(value, float) and math.isfinite(value) and column.endswith(suffix)
    }


def _with_items(path: Path) -> Iterator[tuple[Mapping[str, Any], Item]]:
    """Yield each row of a table of scores with each of its images."""
    tables: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in _rows(path):
        file, number = row.get("file"), row.get("row")
        if not isinstance(file, str) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}: a row without file and prompt; `diffalign score` writes them")
        if number is None:
            identity = (("file", file), ("prompt", row["prompt"]))
            yield row, Item(row["prompt"], _located(file, path), identity)
        else:
            tables.setdefault(file, {})[number] = row
    for file, rows in tables.items():
        for item in read_items(_located(file, path)):
            match = rows.get(int(dict(item.row)["row"]))
            if match is not None and match["prompt"] != item.prompt:
                raise UserError(
                    f"{item.where}: the prompt is {item.prompt!r}, but {path} says {match['prompt']!r}; the "
                    "file has changed since it was scored: score it again"
                )
            if match is not None:
                yield match, item


def _located(file: str, table: Path) -> Path:
    """Return a path of a table's row: as written if it exists, else relative to the table."""
    existing = [place for place in (Path(file), table.parent / file) if place.exists()]
    return existing[0] if existing else Path(file)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        for batch in _parquet(path).iter_batches():
            yield from batch.to_pylist()
    else:
        yield from (row for _, row in json_rows(path))


def _parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable parquet file: {error}") from error
