"""A cache of scores on disk, so that a reward scores each pair of image and prompt once.

The cache is one SQLite file: several processes may use it, and a crash loses no committed score. The key is a
digest of the image's encoded bytes, the prompt (and its source image where it has one) and the reward's
identity (its spec, and the sizes and modification times of its local files).
"""

import hashlib
import math
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.registry import parse

_KEYS_PER_QUERY = 500  # SQLite bounds the number of variables of a query


def image_key(data: bytes) -> str:
    """Return a digest of an encoded image."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def reward_key(spec: str) -> str:
    """Return a digest of all that a score depends on besides image and prompt.

    It covers the spec and the sizes and modification times of local files, those of options included; for an
    ensemble, the keys of its members and their weights and normalisation.

    Raises:
        UserError: the spec or its ensemble file is invalid.
    """
    card, source = parse(spec)
    if card.of_others:
        from diffalign.rewards.ensemble import read_members

        return _digest([text for m in read_members(source) for text in (repr(m), reward_key(m.spec))])
    parts = [card.name, source or card.checkpoint]
    named = [place for part in (source or "").split("@") for place in (part, part.partition("=")[2])]
    for path in (Path(place) for place in named if place):  # "" is the working folder
        files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                status = file.stat()
                parts.append(f"{file}:{status.st_size}:{status.st_mtime_ns}")
    return _digest(parts)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=16).hexdigest()


class ScoreCache:
    """The scores in one SQLite file, which is created if it does not exist.

    Raises:
        UserError: the file is no score cache, or cannot be opened.
    """

    def __init__(self, path: Path | str):
        self._path = Path(path)
        with self._opened() as database:
            database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL)")
            columns = [row[1] for row in database.execute("PRAGMA table_info(scores)")]
            if columns != ["key", "score"]:
                raise sqlite3.DatabaseError(f"its table scores has the columns {', '.join(columns)}")

    @staticmethod
    def key(image: str, prompt: str, reward: str) -> str:
        """Return the key of one score; ``image`` is an ``image_key``, ``reward`` a ``reward_key``.

        Raises:
            UserError: the source image of the prompt cannot be read.
        """
        source = (prompt.digest,) if isinstance(prompt, SourcedPrompt) else ()
        return _digest((image, reward, prompt, *source))

    def get(self, keys: Sequence[str]) -> dict[str, float]:
        """Return the cached scores among ``keys``, by key."""
        cached: dict[str, float] = {}
        with self._opened() as database:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = list(keys[start : start + _KEYS_PER_QUERY])
                marks = ",".join("?" * len(part))
                cached.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        # `put` writes finite numbers only; any other value is damage, and is scored again
        return {key: score for key, score in cached.items() if _is_finite(score)}

    def put(self, scores: Mapping[str, float]) -> None:
        """Write scores by key in one transaction.

        Raises:
            ValueError: a score is no finite number; nothing is written.
        """
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
    """Open an SQLite file, creating it if needed; commit on exit, roll back after an error.

    Raises:
        UserError: ``path`` cannot be opened or written, is damaged, or is not ``what`` (a noun for messages);
            it names the file and the remedy.
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
