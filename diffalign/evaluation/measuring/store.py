"""What has been measured of drawn files, on disk beside them: an evaluation that is stopped loses none of it.

One SQLite file holds scores, by image, prompt and reward, and statistics with thumbnails, by image. Files are
measured in lots, always the same ones together, and each lot is written at once; processes share the lots
out, and so neither their number nor an interruption changes a score. Rewards are loaded one after another,
and only those that have something left to score.
"""

import gc
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from diffalign.evaluation.measuring.image_statistics import THUMBNAIL
from diffalign.evaluation.measuring.measuring import IMAGES, VIDEOS, Measured, check_finite, look
from diffalign.media.files import all_videos, open_media
from diffalign.rewards.scoring.cache import ScoreCache, image_key
from diffalign.rewards.videos import FRAMES, takes_videos
from diffalign.types import Reward

_ASKED = 500  # keys a query: SQLite bounds the number of variables
_LOOKS = "1"  # of the statistics of an image: another number when they become others


@dataclass(frozen=True)
class Asked:
    """A reward that is asked for.

    Attributes:
        name: in the report.
        key: its identity (``rewards.cache.reward_key``): scores of another one are not taken for its own.
        load: gives it, when there is something to score.
    """

    name: str
    key: str
    load: Callable[[], Reward]


@dataclass(frozen=True)
class Lot:
    """Files that are measured together, images or videos, and their prompts."""

    files: tuple[Path, ...]
    prompts: tuple[str, ...]
    videos: bool

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of the files' bytes."""
        return tuple(image_key(file.read_bytes()) for file in self.files)

    def keys(self, reward: Asked) -> list[str]:
        """Of the scores."""
        identity = f"{reward.key} of {FRAMES} frames" if self.videos else reward.key
        return [
            ScoreCache.key(digest, prompt, identity)
            for digest, prompt in zip(self.digests, self.prompts, strict=True)
        ]


def lots(files: Sequence[Path], prompts: Sequence[str]) -> list[Lot]:
    """The lots of one model's files; UserError if images and videos are mixed."""
    videos = all_videos(files)
    size = VIDEOS if videos else IMAGES
    return [
        Lot(tuple(files[start : start + size]), tuple(prompts[start : start + size]), videos)
        for start in range(0, len(files), size)
    ]


class Kept:
    """The measurements in one file; made if it is not there. UserError if the file is something else."""

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._scores = ScoreCache(path)
        with closing(self._open()) as database, database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS looks "
                "(key TEXT PRIMARY KEY, statistics TEXT NOT NULL, thumbnail BLOB NOT NULL)"
            )

    def fill(self, mine: Sequence[Lot], rewards: Sequence[Asked], progress: bool = True) -> None:
        """Measure what has not been measured.

        Raises:
            UserError: a file cannot be read, a score is not a finite number, or a reward of videos is to
            judge
                images.
        """
        total = sum(len(lot.files) for lot in mine) * (len(rewards) + 1)
        with tqdm(total=total, unit="image", disable=not progress) as bar:
            for asked in rewards:
                bar.set_description(f"scoring by {asked.name}")
                self._score(mine, asked, bar)
            bar.set_description("statistics")
            for lot in mine:
                self._look(lot)
                bar.update(len(lot.files))

    def measured(self, every: Sequence[Lot], rewards: Sequence[Asked]) -> Measured:
        """What has been measured of files, in their order. KeyError for what has not been."""
        scores: dict[str, list[float]] = {}
        for asked in rewards:
            keys = [key for lot in every for key in lot.keys(asked)]
            known = self._scores.get(keys)
            scores[asked.name] = [known[key] for key in keys]
        digests = [digest for lot in every for digest in lot.digests]
        looks = self._looks(digests)
        statistics = {name: [looks[d][0][name] for d in digests] for name in looks[digests[0]][0]}
        return Measured(scores, statistics, [looks[digest][1] for digest in digests])

    def _score(self, mine: Sequence[Lot], asked: Asked, bar: tqdm) -> None:
        reward: Reward | None = None
        for lot in mine:
            keys = lot.keys(asked)
            known = self._scores.get(keys)
            new = {key: i for i, key in enumerate(keys) if key not in known}  # of equal images one is enough
            if new:
                if reward is None:
                    reward = takes_videos(asked.load()) if lot.videos else asked.load()
                prompts = [lot.prompts[i] for i in new.values()]
                values = reward([open_media(lot.files[i]) for i in new.values()], prompts).tolist()
                check_finite(asked.name, values, prompts, "an image" if not lot.videos else "a video")
                self._scores.put(dict(zip(new, values, strict=True)))
            bar.update(len(lot.files))
        if reward is not None:
            del reward
            freed()

    def _look(self, lot: Lot) -> None:
        known = self._looks(lot.digests)
        rows = []
        for file, digest in zip(lot.files, lot.digests, strict=True):
            if digest not in known:
                statistics, thumbnail = look(open_media(file))
                pixels = (thumbnail * 255).round().astype(np.uint8).tobytes()  # as it was before the division
                rows.append((_LOOKS + digest, json.dumps(statistics), pixels))
        if rows:
            with closing(self._open()) as database, database:
                database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", rows)

    def _looks(self, digests: Sequence[str]) -> dict[str, tuple[dict[str, float], np.ndarray]]:
        found = {}
        with closing(self._open()) as database:
            for start in range(0, len(digests), _ASKED):
                part = [_LOOKS + digest for digest in digests[start : start + _ASKED]]
                marks = ",".join("?" * len(part))
                rows = database.execute(f"SELECT * FROM looks WHERE key IN ({marks})", part)
                for key, statistics, pixels in rows:
                    thumbnail = np.frombuffer(pixels, np.uint8).reshape(-1, THUMBNAIL, 3) / 255
                    found[key.removeprefix(_LOOKS)] = json.loads(statistics), thumbnail
        return found

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)


def freed() -> None:
    """Give the memory of what is no longer held back to the accelerator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
