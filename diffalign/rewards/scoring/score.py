"""Score items (folders, parquet, jsonl, samples of a run) with any rewards, and write a table.

Scores of a known image and prompt come from the cache. Unreadable files are skipped and reported by their
location. The table is written atomically, as jsonl or parquet by its suffix.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.media.frames import evenly_spaced
from diffalign.media.images import UNREADABLE, decode, has_further_frames, note_on_frames, why_unreadable
from diffalign.media.videos import Video, channels_first, need_av, probe, read_frames, read_video
from diffalign.rewards.ensemble import Member, ensemble_of, read_members, total
from diffalign.rewards.registry import load, parse
from diffalign.rewards.scoring.cache import ScoreCache, image_key, reward_key
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.videos import FRAMES, takes_videos
from diffalign.types import Reward
from diffalign.utils.files import open_atomic, write_atomic

logger = logging.getLogger(__name__)

_CHUNK = 64  # images in memory at once
_VIDEOS = 4  # videos in memory at once


@dataclass(frozen=True)
class Scorer:
    """A loaded reward, its name in the table and its key in the cache.

    Attributes:
        name: name of the score's column.
        reward: the reward.
        key: the reward's part of cache keys; None if its scores are not cached.
        at_once: images a call of the reward; their scores are stored after each call.
        parts: scorers of an ensemble's members, which are scored and cached instead of the ensemble.
        members: weights and normalisation of an ensemble's members.
    """

    name: str
    reward: Reward
    key: str | None = None
    at_once: int = _CHUNK
    parts: tuple["Scorer", ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def is_cached(self) -> bool:
        """Whether its scores, or those of a member, are cached."""
        return self.key is not None or any(part.is_cached for part in self.parts)


@dataclass(frozen=True)
class Scored:
    """An item with its scores.

    Attributes:
        item: the item.
        content: digest of its file (``cache.image_key``).
        scores: one score a scorer.
    """

    item: Item
    content: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Unreadable:
    """An item that could not be decoded, and the reason."""

    item: Item
    why: str

    @property
    def text(self) -> str:
        """Location and reason."""
        return f"{self.item.where}: {self.why}"


@dataclass(frozen=True)
class Scores:
    """A table of scores.

    Attributes:
        rows: one dict a row: file, prompt, and scores by reward name.
        unreadable: location and reason of each unreadable item.
    """

    rows: tuple[dict[str, Any], ...]
    unreadable: tuple[str, ...]


def make_scorers(
    specs: Sequence[str], device: str = "cpu", dtype: str = "float32", batch_size: int = 16
) -> list[Scorer]:
    """Load a scorer for each reward spec (see ``rewards.load``).

    Raises:
        UserError: two specs have the same name, or a reward cannot be loaded.
    """
    names = [parse(spec)[0].name for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"reward {twice[0]!r} is named twice; score in two runs to compare two checkpoints of it"
        )
    return [_scorer(spec, device, dtype, batch_size) for spec in specs]


def _scorer(spec: str, device: str, dtype: str, batch_size: int) -> Scorer:
    card, source = parse(spec)
    if card.of_others:
        members = read_members(source)
        parts = tuple(_scorer(member.spec, device, dtype, batch_size) for member in members)
        ensemble = ensemble_of(card.name, members, [part.reward for part in parts])
        return Scorer(card.name, ensemble, None, batch_size, parts, members)
    key = reward_key(spec) + dtype if card.cached else None
    return Scorer(card.name, load(spec, device, dtype, batch_size), key, batch_size)


def score(
    items: Iterable[Item], scorers: Sequence[Scorer], cache: ScoreCache | None = None, progress: bool = True
) -> Scores:
    """Score items (see ``rewards.scoring.items.read_items``) with every scorer and return the table.

    Raises:
        UserError: as ``each_scored``, or no item is readable.
    """
    rows: dict[tuple[tuple[str, str | int], ...], dict[str, Any]] = {}
    unreadable: list[Unreadable] = []
    for one in each_scored(items, scorers, cache, progress):
        if isinstance(one, Unreadable):
            unreadable.append(one)
            continue
        row = rows.setdefault(one.item.row, dict(one.item.row))
        for scorer, value in zip(scorers, one.scores, strict=True):
            row[f"{scorer.name}{one.item.suffix}"] = value
    if not rows:
        raise UserError(none_readable(unreadable))
    return Scores(tuple(rows.values()), tuple(one.text for one in unreadable))


def none_readable(unreadable: Sequence[Unreadable]) -> str:
    """Return the error message for an input without a readable item."""
    first = unreadable[0]
    kind = "videos" if first.item.is_video else "images"
    return f"none of the {len(unreadable)} {kind} can be read; the first: {first.text}"


def each_scored(
    items: Iterable[Item], scorers: Sequence[Scorer], cache: ScoreCache | None = None, progress: bool = True
) -> Iterator[Scored | Unreadable]:
    """Yield each item with its scores, in the order of the items.

    Items are decoded in chunks of 64 images or 4 videos. Each chunk's scores are cached before it is yielded,
    so an interrupted call loses at most one chunk.

    Raises:
        UserError: no items, no scorers, a prompt that a reward cannot read, or a score that is not finite.
    """
    if not scorers:
        raise UserError("nothing to score by: give at least one reward")
    source = iter(items)
    first = list(islice(source, 1))
    if not first:
        raise UserError("nothing to score: no images")
    source, videos = chain(first, source), first[0].is_video
    all_frames, animated = _need_all_frames(scorers), list[str]()
    with tqdm(desc="scoring", unit="video" if videos else "image", disable=not progress) as bar:
        while chunk := list(islice(source, _VIDEOS if videos else _CHUNK)):
            entries = [_try_to_open(item, videos, all_frames) for item in chunk]
            opened = [entry for entry in entries if not isinstance(entry, Unreadable)]
            columns = [_score_chunk(opened, scorer, cache) for scorer in scorers]
            rows = iter(zip(*columns, strict=True))
            for entry in entries:
                yield entry if isinstance(entry, Unreadable) else Scored(entry.item, entry.key, next(rows))
            animated += [entry.item.where for entry in opened if entry.is_animation]
            bar.update(len(chunk))
    if animated:
        logger.warning("%s", note_on_frames(animated))


class _Opened(NamedTuple):
    """A decoded item, its image key, and whether it is an animation, of which the first frame is decoded."""

    item: Item
    key: str
    content: Image.Image | Video
    is_animation: bool = False


def _need_all_frames(scorers: Iterable[Scorer]) -> bool:
    """Return whether a scorer is a video reward; image rewards use a few frames of a video only."""
    return any(takes_videos(scorer.reward) is scorer.reward for scorer in scorers)


def _try_to_open(item: Item, videos: bool, all_frames: bool) -> _Opened | Unreadable:
    """Decode an item, or return why it is unreadable.

    Raises:
        UserError: an image among videos or a video among images, or PyAV is not installed.
    """
    if item.is_video != videos:
        raise UserError(f"{item.where}: images and videos are scored apart, and here are both")
    if videos:
        need_av()
    try:
        return _open(item, all_frames)
    except UNREADABLE as error:  # includes the UserError of an unreadable video, a ValueError
        return Unreadable(item, why_unreadable(error))


def _open(item: Item, all_frames: bool) -> _Opened:
    """Decode an item; raises one of UNREADABLE if it is no image or video."""
    data = item.read()
    if not item.is_video:
        return _Opened(item, image_key(data), decode(data), has_further_frames(data))
    if all_frames:
        return _Opened(item, image_key(data), read_video(data))
    frames = read_frames(data, channels_first, choose=lambda count: evenly_spaced(count, FRAMES))
    return _Opened(item, image_key(data), Video(frames, probe(data).fps))


def score_column(items: Sequence[Item], scorer: Scorer, cache: ScoreCache | None = None) -> list[float]:
    """Return one scorer's scores of readable items, from the cache where it has them."""
    return _score_chunk([_open(item, _need_all_frames([scorer])) for item in items], scorer, cache)


def _score_chunk(opened: Sequence[_Opened], scorer: Scorer, cache: ScoreCache | None) -> list[float]:
    """Return one scorer's scores of decoded images, or of decoded videos."""
    if not opened:
        return []
    if scorer.parts:
        columns = [torch.tensor(_score_chunk(opened, part, cache)) for part in scorer.parts]
        return total(scorer.members, columns).tolist()
    reward, identity = scorer.reward, scorer.key
    if opened[0].item.is_video:
        reward = takes_videos(scorer.reward)
        identity = (
            f"{scorer.key} of {FRAMES} frames" if scorer.key and reward is not scorer.reward else scorer.key
        )
    if cache is None or identity is None:
        return _evaluate(opened, scorer.name, reward)
    keys = [cache.key(entry.key, entry.item.prompt, identity) for entry in opened]
    known = cache.get(keys)
    # equal images of one prompt have one key and are scored once
    new = iter({key: entry for key, entry in zip(keys, opened, strict=True) if key not in known}.items())
    while batch := dict(islice(new, scorer.at_once)):
        scores = dict(zip(batch, _evaluate(list(batch.values()), scorer.name, reward), strict=True))
        cache.put(scores)
        known |= scores
    return [known[key] for key in keys]


def _evaluate(opened: Sequence[_Opened], name: str, reward: Reward) -> list[float]:
    """Return the scores of a reward, without gradients.

    Raises:
        UserError: a score is not finite, or the reward refuses an input; it names the location.
    """
    first, last = opened[0].item.where, opened[-1].item.where
    prompts = [entry.item.prompt for entry in opened]
    try:
        with torch.no_grad():
            scores = reward([entry.content for entry in opened], prompts).tolist()
    except UserError as error:
        raise UserError(f"{first}: {error}" if first == last else f"{first} to {last}: {error}") from error
    for entry, value in zip(opened, scores, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{entry.item.where}: reward {name!r} gives {value}; allowed: finite numbers")
    return scores


def check_table(path: Path | str) -> Path:
    """Return the path of a table to write.

    Raises:
        UserError: its suffix is neither .jsonl nor .parquet.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"cannot write {str(path)!r}: the name must end in .jsonl or .parquet")
    return path


def write_table(rows: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Write rows as jsonl or parquet, atomically; UserError for another suffix."""
    path = check_table(path)
    if path.suffix == ".jsonl":
        write_atomic(path, "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        names = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        with open_atomic(path) as file:
            parquet.write_table(table, file)
    return path
