"""Scores on disk, so that an image is never scored twice by the same reward for the same prompt.

One SQLite file: safe with several processes, and a crash loses nothing that was written. The key is a digest
of the image's encoded bytes, the prompt and the reward's identity (its spec, and the size and time of the
local files behind it).
"""

import hashlib
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from diffalign.errors import UserError
from diffalign.rewards.registry import parse

_KEYS_PER_QUERY = 500  # keys a query: SQLite bounds the number of variables


def image_key(data: bytes) -> str:
    """Return a digest of an encoded image."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def reward_key(spec: str) -> str:
    """Return what a score depends on besides image and prompt: the spec, and the files behind a local source.

    Of an ensemble: what its members depend on, and what it makes of their scores. UserError for a file that
    is none.
    """
    card, source = parse(spec)
    if card.of_others:
        from diffalign.rewards.ensemble import read_members

        behind = [text for m in read_members(source) for text in (repr(m), reward_key(m.spec))]
        return _digest(behind)
    parts = [card.name, source or card.checkpoint]
    for path in (Path(place) for place in (source or "").split("@") if place):  # "" would be the folder here
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                facts = file.stat()
                parts.append(f"{file}:{facts.st_size}:{facts.st_mtime_ns}")
    return _digest(parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


class ScoreCache:
    """The scores in one file; made if it is not there. UserError if the file is something else."""

    def __init__(self, path: Path | str):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._open()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)"
                )
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{str(path)!r} is not a score cache ({error}); remove it or name another"
            ) from error

    @staticmethod
    def key(image: str, prompt: str, reward: str) -> str:
        """Return the key of one score, from ``image_key`` and ``reward_key``."""
        return _digest((image, reward, prompt))

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the scores that are known, by key."""
        found: dict[str, float] = {}
        with closing(self._open()) as database:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = list(keys[start : start + _KEYS_PER_QUERY])
                marks = ",".join("?" * len(part))
                found.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        return found

    def put(self, scores: Mapping[str, float]) -> None:
        """Remember scores by key, all or none of them."""
        with closing(self._open()) as database, database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", list(scores.items()))

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60)
