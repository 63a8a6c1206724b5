"""Scores on disk, so that an image is never scored twice by the same reward for the same prompt.

One SQLite file: safe with several processes, and a crash loses nothing that was written. The key is a digest
of the image's encoded bytes, the prompt and the reward's identity (its spec, and the size and time of the
local files behind it).
"""

import hashlib
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
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
        with self._opened() as database:
            database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")
            columns = [row[1] for row in database.execute("PRAGMA table_info(scores)")]
            if columns != ["key", "score"]:
                raise sqlite3.DatabaseError(f"its table scores has the columns {', '.join(columns)}")

    @staticmethod
    def key(image: str, prompt: str, reward: str) -> str:
        """Return the key of one score, from ``image_key`` and ``reward_key``."""
        return _digest((image, reward, prompt))

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the scores that are known, by key."""
        found: dict[str, float] = {}
        with self._opened() as database:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = list(keys[start : start + _KEYS_PER_QUERY])
                marks = ",".join("?" * len(part))
                found.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        # what is no finite number was never written by `put`: it is scored anew
        return {key: score for key, score in found.items() if _is_finite(score)}

    def put(self, scores: Mapping[str, float]) -> None:
        """Write scores by key, all or none of them; ValueError for one that is no finite number."""
        bad = [score for score in scores.values() if not _is_finite(score)]
        if bad:
            raise ValueError(f"the score {bad[0]!r} is no finite number")
        with self._opened() as database:
            database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", list(scores.items()))

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        with opened(self._path, "a score cache") as database:
            yield database


@contextmanager
def opened(path: Path, what: str) -> Iterator[sqlite3.Connection]:
    """Open an SQLite file, made if it is not there; commit at the end, or nothing after an error.

    Raises:
        UserError: ``path`` cannot be opened or written, or is damaged or another kind of file than ``what``
            says; it names the file and the remedy.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as database, database:
            yield database
    except sqlite3.OperationalError as error:
        raise UserError(
            f"{str(path)!r}: {what} cannot be used there ({error}); name another place"
        ) from error
    except sqlite3.DatabaseError as error:
        raise UserError(f"{str(path)!r} is not {what} ({error}); remove it or name another") from error
    except OSError as error:
        raise UserError(
            f"{str(path)!r}: {what} cannot be made there ({error}); name another place"
        ) from error


def _is_finite(score: object) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)
