"""Score what there is - folders, parquet, jsonl, the samples of a run - with any rewards, and write a table.

Every image or video that a reward has seen before, with the same prompt, comes from the cache; what cannot be
read is skipped with its place named. The table is written atomically, as jsonl or parquet by its name.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.files import open_atomic, write_atomic
from diffalign.rewards.cache import ScoreCache, image_key, reward_key
from diffalign.rewards.items import Item
from diffalign.rewards.of_videos import FRAMES, evenly_spaced, takes_videos
from diffalign.rewards.registry import load, parse
from diffalign.types import Reward
from diffalign.videos import Video, channels_first, need_av, probe, read_frames, read_video

_CHUNK = 64  # images that are open at once, and written to the cache together
_VIDEOS = 4  # videos


@dataclass(frozen=True)
class Scorer:
    """A reward, its name in the table, and its identity in the cache: None if a look-up is no cheaper."""

    name: str
    reward: Reward
    key: str | None = None


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
            f"reward {twice[0]!r} is asked for twice; score in two runs to compare two checkpoints of it"
        )
    return [
        Scorer(
            name,
            load(spec, device, dtype, batch_size),
            reward_key(spec) + dtype if parse(spec)[0].cached else None,
        )
        for name, spec in zip(names, specs, strict=True)
    ]


def score(
    items: Iterable[Item], scorers: Sequence[Scorer], cache: ScoreCache | None = None, progress: bool = True
) -> Scores:
    """Score items (see ``rewards.items.read_items``) with every scorer.

    Raises:
        UserError: no items, no scorers, or a prompt that a reward cannot read.
    """
    if not scorers:
        raise UserError("nothing to score by: give at least one reward")
    rows: dict[tuple[tuple[str, str | int], ...], dict[str, Any]] = {}
    unreadable: list[str] = []
    source, total = iter(items), 0
    first = list(islice(source, 1))
    source, videos = chain(first, source), any(item.is_video for item in first)
    whole = _whole(scorers)
    with tqdm(desc="scoring", unit="video" if videos else "image", disable=not progress) as bar:
        while chunk := list(islice(source, _VIDEOS if videos else _CHUNK)):
            total += len(chunk)
            images = []
            for item in chunk:
                if item.is_video != videos:
                    raise UserError(f"{item.where}: images and videos are scored apart, and here are both")
                try:
                    images.append(_open(item, whole))
                except (OSError, SyntaxError) as error:  # Pillow raises both for broken files
                    unreadable.append(f"{item.where}: {error}")
            for scorer in scorers:
                values = _score_chunk(images, scorer, cache)
                for (item, _, _), value in zip(images, values, strict=True):
                    row = rows.setdefault(item.row, dict(item.row))
                    row[f"{scorer.name}{item.suffix}"] = value
            bar.update(len(chunk))
    if not total:
        raise UserError("nothing to score: no images")
    if not rows:
        kind = "videos" if videos else "images"
        raise UserError(f"none of the {total} {kind} can be read; the first: {unreadable[0]}")
    return Scores(tuple(rows.values()), tuple(unreadable))


_Opened = tuple[Item, str, Image.Image | Video]


def _whole(scorers: Iterable[Scorer]) -> bool:
    """Whether one of them wants all frames of videos, and not just those that rewards of images see."""
    return any(takes_videos(scorer.reward) is scorer.reward for scorer in scorers)


def _open(item: Item, whole: bool) -> _Opened:
    data = item.read()
    if item.is_video:
        need_av()
        try:
            if whole:
                return item, image_key(data), read_video(data)
            frames = read_frames(data, channels_first, some=lambda count: evenly_spaced(count, FRAMES))
            return item, image_key(data), Video(frames, probe(data).fps)
        except UserError as error:
            raise OSError(str(error)) from error
    with Image.open(io.BytesIO(data)) as image:
        return item, image_key(data), image.convert("RGB")


def score_column(items: Sequence[Item], scorer: Scorer, cache: ScoreCache | None = None) -> list[float]:
    """The scores of readable items by one scorer, what the cache knows from there."""
    return _score_chunk([_open(item, _whole([scorer])) for item in items], scorer, cache)


def _score_chunk(opened: Sequence[_Opened], scorer: Scorer, cache: ScoreCache | None) -> list[float]:
    """The scores of images, or of videos."""
    if not opened:
        return []
    reward, identity = scorer.reward, scorer.key
    if opened[0][0].is_video:
        reward = takes_videos(scorer.reward)
        identity = (
            f"{scorer.key} of {FRAMES} frames" if scorer.key and reward is not scorer.reward else scorer.key
        )
    if cache is None or identity is None:
        return reward([media for _, _, media in opened], [item.prompt for item, _, _ in opened]).tolist()
    keys = [cache.key(key, item.prompt, identity) for item, key, _ in opened]
    known = cache.get(keys)
    # One image of several equal ones is enough.
    new = {key: one for key, one in zip(keys, opened, strict=True) if key not in known}
    if new:
        fresh = reward([media for _, _, media in new.values()], [item.prompt for item, _, _ in new.values()])
        scores = dict(zip(new, fresh.tolist(), strict=True))
        cache.put(scores)
        known |= scores
    return [known[key] for key in keys]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """Write rows as jsonl or parquet, atomically; UserError for another suffix."""
    path = Path(path)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"cannot write {str(path)!r}: the name must end in .jsonl or .parquet")
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
