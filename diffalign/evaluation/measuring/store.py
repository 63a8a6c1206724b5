"""Measurements of generated files, on disk beside them, so that a stopped evaluation loses none.

One SQLite file holds scores, by image, prompt and reward, and statistics with thumbnails, by image. Files are
measured in fixed chunks, and each chunk is written as soon as it is measured; processes divide the chunks, so
neither their number nor an interruption changes a score. Rewards are loaded one after another, and only if
they have files left to score.
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffalign.evaluation.measuring.image_statistics import THUMBNAIL
from diffalign.evaluation.measuring.measuring import IMAGES, VIDEOS, Measured, check_finite, look
from diffalign.media.files import all_videos, open_media
from diffalign.rewards.scoring.cache import ScoreCache, image_key, opened
from diffalign.rewards.videos import FRAMES, takes_videos
from diffalign.types import Reward

_KEYS_PER_QUERY = 500  # keys a query: SQLite bounds the number of variables
_KIND = "a store of measurements"
_LOOKS = "1"  # version of the image statistics: increase it when they change


@dataclass(frozen=True)
class NamedReward:
    """A reward under its name in the report.

    Attributes:
        name: in the report.
        key: its identity (``rewards.scoring.cache.reward_key``): only its own scores are used.
        load: loads it, when there is something to score.
    """

    name: str
    key: str
    load: Callable[[], Reward]


@dataclass(frozen=True)
class Chunk:
    """Files that are measured together, images or videos, and their prompts."""

    files: tuple[Path, ...]
    prompts: tuple[str, ...]
    videos: bool

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of the files' bytes."""
        return tuple(image_key(file.read_bytes()) for file in self.files)

    def keys(self, reward: NamedReward) -> list[str]:
        """Of the scores."""
        identity = f"{reward.key} of {FRAMES} frames" if self.videos else reward.key
        return [
            ScoreCache.key(digest, prompt, identity)
            for digest, prompt in zip(self.digests, self.prompts, strict=True)
        ]


def chunks(files: Sequence[Path], prompts: Sequence[str]) -> list[Chunk]:
    """Return the chunks of one model's files; UserError if images and videos are mixed."""
    videos = all_videos(files)
    size = VIDEOS if videos else IMAGES
    return [
        Chunk(tuple(files[start : start + size]), tuple(prompts[start : start + size]), videos)
        for start in range(0, len(files), size)
    ]


class MeasurementStore:
    """The measurements in one file, created if needed. UserError if the file is something else."""

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._scores = ScoreCache(path)
        with opened(self._path, _KIND) as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS looks "
                "(key TEXT PRIMARY KEY, statistics TEXT NOT NULL, thumbnail BLOB NOT NULL)"
            )

    def fill(self, mine: Sequence[Chunk], rewards: Sequence[NamedReward], progress: bool = True) -> None:
        """Measure what has not been measured.

        Raises:
            UserError: a file cannot be read, a score is not a finite number, or a reward of videos gets
                images.
        """
        total = sum(len(chunk.files) for chunk in mine) * (len(rewards) + 1)
        with tqdm(total=total, unit="image", disable=not progress) as bar:
            for reward in rewards:
                bar.set_description(f"scoring by {reward.name}")
                self._score(mine, reward, bar)
            bar.set_description("statistics")
            for chunk in mine:
                self._look(chunk)
                bar.update(len(chunk.files))

    def measured(self, every: Sequence[Chunk], rewards: Sequence[NamedReward]) -> Measured:
        """Return what has been measured of files, in their order. KeyError for what has not been."""
        scores: dict[str, list[float]] = {}
        for reward in rewards:
            keys = [key for chunk in every for key in chunk.keys(reward)]
            known = self._scores.get(keys)
            scores[reward.name] = [known[key] for key in keys]
        digests = [digest for chunk in every for digest in chunk.digests]
        looks = self._looks(digests)
        statistics = {name: [looks[d][0][name] for d in digests] for name in looks[digests[0]][0]}
        return Measured(scores, statistics, [looks[digest][1] for digest in digests])

    def _score(self, mine: Sequence[Chunk], named: NamedReward, bar: tqdm) -> None:
        reward: Reward | None = None
        for chunk in mine:
            keys = chunk.keys(named)
            known = self._scores.get(keys)
            new = {key: i for i, key in enumerate(keys) if key not in known}  # equal images are measured once
            if new:
                if reward is None:
                    reward = takes_videos(named.load()) if chunk.videos else named.load()
                prompts = [chunk.prompts[i] for i in new.values()]
                values = reward([open_media(chunk.files[i]) for i in new.values()], prompts).tolist()
                check_finite(named.name, values, prompts, "an image" if not chunk.videos else "a video")
                self._scores.put(dict(zip(new, values, strict=True)))
            bar.update(len(chunk.files))
        if reward is not None:
            del reward
            freed()

    def _look(self, chunk: Chunk) -> None:
        known = self._looks(chunk.digests)
        rows = []
        for file, digest in zip(chunk.files, chunk.digests, strict=True):
            if digest not in known:
                statistics, thumbnail = look(open_media(file))
                pixels = (thumbnail * 255).round().astype(np.uint8).tobytes()  # as it was before the division
                rows.append((_LOOKS + digest, json.dumps(statistics), pixels))
        if rows:
            with opened(self._path, _KIND) as database:
                database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", rows)

    def _looks(self, digests: Sequence[str]) -> dict[str, tuple[dict[str, float], np.ndarray]]:
        found = {}
        with opened(self._path, _KIND) as database:
            for start in range(0, len(digests), _KEYS_PER_QUERY):
                part = [_LOOKS + digest for digest in digests[start : start + _KEYS_PER_QUERY]]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT * FROM looks WHERE key IN ({marks})", part)
                for key, statistics, pixels in rows:
                    thumbnail = np.frombuffer(pixels, np.uint8).reshape(-1, THUMBNAIL, 3) / 255
                    found[key.removeprefix(_LOOKS)] = json.loads(statistics), thumbnail
        return found


def freed() -> None:
    """Give the memory of what is no longer held back to the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
