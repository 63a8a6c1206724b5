"""Score what there is - folders, parquet, jsonl, the samples of a run - with any rewards, and write a table.

Every image or video that a reward has seen before, with the same prompt, comes from the cache; what cannot be
read is skipped with its place named. The table is written atomically, as jsonl or parquet by its name.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.media.frames import evenly_spaced
from diffalign.media.images import UNREADABLE, decode, why_unreadable
from diffalign.media.videos import Video, channels_first, need_av, probe, read_frames, read_video
from diffalign.rewards.ensemble import Member, ensemble_of, read_members, total
from diffalign.rewards.registry import load, parse
from diffalign.rewards.scoring.cache import ScoreCache, image_key, reward_key
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.videos import FRAMES, takes_videos
from diffalign.types import Reward
from diffalign.utils.files import open_atomic, write_atomic

_CHUNK = 64  # images that are open at once
_VIDEOS = 4  # videos


@dataclass(frozen=True)
class Scorer:
    """A reward under its name in the table.

    Attributes:
        name: of the reward.
        reward: to ask.
        key: its identity in the cache; None if a look-up is no cheaper.
        at_once: images that are scored, and whose scores are stored, together.
        parts: of an ensemble its members, which are scored, and stored, instead of it.
        members: what an ensemble makes of their scores.
    """

    name: str
    reward: Reward
    key: str | None = None
    at_once: int = _CHUNK
    parts: tuple["Scorer", ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def is_cached(self) -> bool:
        """Whether any of its scores are kept."""
        return self.key is not None or any(part.is_cached for part in self.parts)


@dataclass(frozen=True)
class Scored:
    """An item, the digest of its file (``cache.image_key``), and its score by each of the scorers."""

    item: Item
    content: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Unreadable:
    """An item that is no image or video, or a damaged one, and why."""

    item: Item
    why: str

    @property
    def text(self) -> str:
        """Place and reason."""
        return f"{self.item.where}: {self.why}"


@dataclass(frozen=True)
class Scores:
    """The table, one dict a row (file, prompt, scores by reward name), and the unreadable images' places."""

    rows: tuple[dict[str, Any], ...]
    unreadable: tuple[str, ...]


def make_scorers(
    specs: Sequence[str], device: str = "cpu", dtype: str = "float32", batch_size: int = 16
) -> list[Scorer]:
    """Scorers of reward specs (see ``rewards.load``), by the specs' names; UserError if one occurs twice."""
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
        whole = ensemble_of(card.name, members, [part.reward for part in parts])
        return Scorer(card.name, whole, None, batch_size, parts, members)
    key = reward_key(spec) + dtype if card.cached else None
    return Scorer(card.name, load(spec, device, dtype, batch_size), key, batch_size)


def score(
    items: Iterable[Item], scorers: Sequence[Scorer], cache: ScoreCache | None = None, progress: bool = True
) -> Scores:
    """Score items (see ``rewards.scoring.items.read_items``) with every scorer, as a table.

    Raises:
        UserError: as ``each_scored`` says, or not one item can be read.
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
    """Return the message for a set of which nothing could be read."""
    first = unreadable[0]
    kind = "videos" if first.item.is_video else "images"
    return f"none of the {len(unreadable)} {kind} can be read; the first: {first.text}"


def each_scored(
    items: Iterable[Item], scorers: Sequence[Scorer], cache: ScoreCache | None = None, progress: bool = True
) -> Iterator[Scored | Unreadable]:
    """Every item with its scores, in the order of the items; some are open at a time, and the cache has the
    scores of all items before an interruption.

    Raises:
        UserError: no items, no scorers, a prompt that a reward cannot read, or a score that is no finite
            number.
    """
    if not scorers:
        raise UserError("nothing to score by: give at least one reward")
    source = iter(items)
    first = list(islice(source, 1))
    if not first:
        raise UserError("nothing to score: no images")
    source, videos = chain(first, source), first[0].is_video
    whole = _whole(scorers)
    with tqdm(desc="scoring", unit="video" if videos else "image", disable=not progress) as bar:
        while chunk := list(islice(source, _VIDEOS if videos else _CHUNK)):
            seen = [_tried(item, videos, whole) for item in chunk]
            opened = [one for one in seen if not isinstance(one, Unreadable)]
            columns = [_score_chunk(opened, scorer, cache) for scorer in scorers]
            rows = iter(zip(*columns, strict=True))
            for one in seen:
                yield one if isinstance(one, Unreadable) else Scored(one[0], one[1], next(rows))
            bar.update(len(chunk))


_Opened = tuple[Item, str, Image.Image | Video]


def _whole(scorers: Iterable[Scorer]) -> bool:
    """Whether one of them wants all frames of videos, and not just those that rewards of images see."""
    return any(takes_videos(scorer.reward) is scorer.reward for scorer in scorers)


def _tried(item: Item, videos: bool, whole: bool) -> _Opened | Unreadable:
    """Return an item opened, where it can be; UserError for an image among videos, or the other way round."""
    if item.is_video != videos:
        raise UserError(f"{item.where}: images and videos are scored apart, and here are both")
    if videos:
        need_av()
    try:
        return _open(item, whole)
    except UNREADABLE as error:  # of videos a UserError, which is a ValueError
        return Unreadable(item, why_unreadable(error))


def _open(item: Item, whole: bool) -> _Opened:
    """One of UNREADABLE is raised for what is no image or video."""
    data = item.read()
    if not item.is_video:
        return item, image_key(data), decode(data)
    if whole:
        return item, image_key(data), read_video(data)
    frames = read_frames(data, channels_first, some=lambda count: evenly_spaced(count, FRAMES))
    return item, image_key(data), Video(frames, probe(data).fps)


def score_column(items: Sequence[Item], scorer: Scorer, cache: ScoreCache | None = None) -> list[float]:
    """Return the scores of readable items by one scorer, what the cache knows from there."""
    return _score_chunk([_open(item, _whole([scorer])) for item in items], scorer, cache)


def _score_chunk(opened: Sequence[_Opened], scorer: Scorer, cache: ScoreCache | None) -> list[float]:
    """Return the scores of images, or of videos."""
    if not opened:
        return []
    if scorer.parts:
        columns = [torch.tensor(_score_chunk(opened, part, cache)) for part in scorer.parts]
        return total(scorer.members, columns).tolist()
    ask, identity = scorer.reward, scorer.key
    if opened[0][0].is_video:
        ask = takes_videos(scorer.reward)
        identity = (
            f"{scorer.key} of {FRAMES} frames" if scorer.key and ask is not scorer.reward else scorer.key
        )
    if cache is None or identity is None:
        return _evaluate(opened, scorer.name, ask)
    keys = [cache.key(key, item.prompt, identity) for item, key, _ in opened]
    known = cache.get(keys)
    # One image of several equal ones is enough.
    new = iter({key: one for key, one in zip(keys, opened, strict=True) if key not in known}.items())
    while some := dict(islice(new, scorer.at_once)):
        scores = dict(zip(some, _evaluate(list(some.values()), scorer.name, ask), strict=True))
        cache.put(scores)
        known |= scores
    return [known[key] for key in keys]


def _evaluate(opened: Sequence[_Opened], name: str, reward: Reward) -> list[float]:
    """Return the scores of a reward, without gradients.

    Raises:
        UserError: a score that is no finite number, or what the reward refuses, with the place.
    """
    first, last = opened[0][0].where, opened[-1][0].where
    try:
        with torch.no_grad():
            scores = reward([one for _, _, one in opened], [item.prompt for item, _, _ in opened]).tolist()
    except UserError as error:
        raise UserError(f"{first}: {error}" if first == last else f"{first} to {last}: {error}") from error
    for (item, _, _), value in zip(opened, scores, strict=True):
        if not math.isfinite(value):
            raise UserError(f"{item.where}: reward {name!r} gives {value}; allowed: finite numbers")
    return scores


def check_table(path: Path | str) -> Path:
    """Return the path of a table to be written; UserError if its suffix is of none that can be."""
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
