"""Scored images or videos, of which pairs are made: scored now, or read off a table of ``diffalign score``.

Embedded images are put aside on disk while the source is read, so that it need not fit in memory.
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
class Kept:
    """Offset and length of a file's bytes in the temporary file."""

    offset: int
    length: int


class Shelf:
    """Encoded files in one temporary file on disk, which closing deletes."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)

    def __enter__(self) -> "Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def keep(self, data: bytes) -> Kept:
        """Append bytes; return their place."""
        offset = self._file.seek(0, 2)
        self._file.write(data)
        return Kept(offset, len(data))

    def read(self, media: Kept | Path) -> bytes:
        """Return what was put aside, or a file's content; OSError if that cannot be read."""
        if isinstance(media, Path):
            return read_file(media)
        self._file.seek(media.offset)
        return self._file.read(media.length)


@dataclass(frozen=True)
class Candidate:
    """One image or video.

    Attributes:
        prompt: its prompt; candidates of one prompt are rivals.
        media: its file, or where it lies on the shelf.
        content: digest of the encoded bytes.
        scores: R, one a reward.
        is_video: what it is.
        small: what near duplicates are found by, where they are looked for.
    """

    prompt: str
    media: Path | Kept
    content: str
    scores: tuple[float, ...]
    is_video: bool = False
    small: Thumbnail | None = None


@dataclass(frozen=True)
class Found:
    """Candidates in the order of the source, the names of their R rewards, and what could not be read."""

    candidates: tuple[Candidate, ...]
    rewards: tuple[str, ...]
    unreadable: tuple[str, ...] = ()


def scored_now(
    items: Iterable[Item],
    scorers: Sequence[Scorer],
    cache: ScoreCache | None,
    shelf: Shelf,
    *,
    near: bool = False,
    progress: bool = True,
) -> Found:
    """Candidates of what ``rewards.scoring.items.read_items`` gives; ``near``: with thumbnails.

    Raises:
        UserError: nothing to score, nothing that can be read, or what a reward refuses.
    """
    candidates, unreadable = [], []
    for one in each_scored(items, scorers, cache, progress):
        if isinstance(one, Unreadable):
            unreadable.append(one)
        else:
            candidates.append(_candidate(one.item, one.item.read(), one.content, one.scores, shelf, near))
    if not candidates:
        raise UserError(none_readable(unreadable))
    names = tuple(scorer.name for scorer in scorers)
    return Found(tuple(candidates), names, tuple(one.text for one in unreadable))


def is_score_table(path: Path) -> bool:
    """Return whether a file is a table of ``diffalign score``, and no set of images."""
    if path.suffix == ".jsonl" and path.is_file():
        first = next(iter(_rows(path)), {})
        columns: Sequence[str] = list(first)
    elif path.suffix == ".parquet" and path.is_file():
        columns = _parquet(path).schema_arrow.names
    else:
        return False
    return {"file", "prompt"} <= set(columns) and not has_media(columns)


def from_table(
    path: Path, rewards: Sequence[str], shelf: Shelf, *, limit: int | None = None, near: bool = False
) -> Found:
    """Candidates of a table of scores, whose images lie where they lay.

    Args:
        path: the table.
        rewards: names of those to use; none: all that the table has.
        shelf: for embedded images.
        limit: the first so many images only.
        near: with thumbnails.

    Raises:
        UserError: no such scores, a source that is gone or has changed, or nothing that can be read.
    """
    entries: list[tuple[Candidate, Mapping[str, float], str]] = []
    unreadable: list[str] = []
    for row, item in islice(_with_items(path), limit):
        try:
            data = item.read()
            if not item.is_video:  # it may have been damaged since it was scored
                decode(data)
            one = _candidate(item, data, image_key(data), (), shelf, near)
        except UNREADABLE as error:
            unreadable.append(f"{item.where}: {why_unreadable(error)}")
        else:
            entries.append((one, _scores(row, item.suffix), item.where))
    there = list(dict.fromkeys(name for _, scores, _ in entries for name in scores))
    if entries and not there:
        raise UserError(f"{path}: no scores in it; `diffalign score` writes such tables")
    names = tuple(rewards or there)
    candidates = []
    for one, scores, where in entries:
        if missing := [name for name in names if name not in scores]:
            if missing[0] not in there:
                raise unknown(f"reward of {path}", missing[0], there)
            unreadable.append(f"{where}: no finite score by {missing[0]}")
        else:
            candidates.append(replace(one, scores=tuple(scores[name] for name in names)))
    if not candidates:
        raise UserError(
            f"{path}: no image with a score in it" + (f"; the first: {unreadable[0]}" if unreadable else "")
        )
    return Found(tuple(candidates), names, tuple(unreadable))


def _candidate(
    item: Item, data: bytes, content: str, scores: tuple[float, ...], shelf: Shelf, near: bool
) -> Candidate:
    """Return the content; one of UNREADABLE is raised where a thumbnail is needed of what is no image."""
    small = thumbnail(data) if near and not item.is_video else None
    media = item.image if isinstance(item.image, Path) else shelf.keep(data)
    return Candidate(item.prompt, media, content, scores, item.is_video, small)


def _scores(row: Mapping[str, Any], suffix: str) -> dict[str, float]:
    """Return the finite scores by reward of the image of this suffix."""
    return {
        column.removesuffix(suffix): value
        for column, value in row.items()
        if isinstance(value, float) and math.isfinite(value) and column.endswith(suffix)
    }


def _with_items(path: Path) -> Iterator[tuple[Mapping[str, Any], Item]]:
    """Return the rows of a table of scores, and the images of each."""
    tables: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in _rows(path):
        file, number = row.get("file"), row.get("row")
        if not isinstance(file, str) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{path}: a row without file and prompt; `diffalign score` writes them")
        if number is None:
            identity = (("file", file), ("prompt", row["prompt"]))
            yield row, Item(row["prompt"], _placed(file, path), identity)
        else:
            tables.setdefault(file, {})[number] = row
    for file, rows in tables.items():
        for item in read_items(_placed(file, path)):
            found = rows.get(int(dict(item.row)["row"]))
            if found is not None and found["prompt"] != item.prompt:
                raise UserError(
                    f"{item.where}: the prompt is {item.prompt!r}, but {path} says {found['prompt']!r}; the "
                    "file has changed since it was scored: score it again"
                )
            if found is not None:
                yield found, item


def _placed(file: str, table: Path) -> Path:
    """Return a file of a table, as it says or beside it."""
    there = [place for place in (Path(file), table.parent / file) if place.exists()]
    return there[0] if there else Path(file)


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
