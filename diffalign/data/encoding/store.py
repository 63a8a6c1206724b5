"""Tensors on disk, keyed by a digest of their inputs.

A key is a digest of the inputs, so a record is never outdated: it exists or it does not. Records are in
shards (``shards``); several processes write to one store, each its own shards. A record with a wrong checksum
counts as absent. The layout of earlier versions, one safetensors file for each record, is read too, and an
encoding moves its records to shards.
"""

import errno
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffalign.data.encoding.folder import Folder
from diffalign.data.encoding.shards import PART, SHARD_BYTES, Shard, ShardWriter, Tensors, salvage
from diffalign.data.reading.examples import digest
from diffalign.errors import UserError

__all__ = ["Memory", "Store", "Tensors", "is_full", "no_space", "tensors_digest"]

RELEASE_BYTES = 128 * 2**20  # of mapped pages, after which the system may release them
_AROUND = 2**16  # bytes that the system maps around an accessed page


class _Index:
    """The places of the records of one kind: sorted keys, each with its shard and row."""

    def __init__(self) -> None:
        self.shards: list[Shard] = []
        self._high = np.zeros(0, np.uint64)
        self._low = np.zeros(0, np.uint64)
        self._shard = np.zeros(0, np.uint32)
        self._row = np.zeros(0, np.uint32)

    def add(self, shards: list[tuple[Shard, np.ndarray]]) -> None:
        """Add the rows of shards; each comes with the numbers of its sound rows."""
        parts = [(self._high, self._low, self._shard, self._row)]
        for shard, rows in shards:
            keys = shard.keys[rows]
            numbers = np.full(len(rows), len(self.shards), np.uint32)
            parts.append((keys[:, 0], keys[:, 1], numbers, rows.astype(np.uint32)))
            shard.keys = shard.keys[:0]  # held here from now on
            self.shards.append(shard)
        high, low, number, row = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(high, kind="stable")
        self._high, self._low, self._shard, self._row = high[order], low[order], number[order], row[order]

    def find(self, key: str) -> Iterator[tuple[Shard, int]]:
        """Yield the places of a key; the first undamaged one is used."""
        high, low = np.uint64(int(key[:16], 16)), np.uint64(int(key[16:], 16))
        at = int(np.searchsorted(self._high, high))
        while at < len(self._high) and self._high[at] == high:
            if self._low[at] == low:
                yield self.shards[self._shard[at]], int(self._row[at])
            at += 1

    def missing(self, keys: np.ndarray) -> np.ndarray:
        """Return those of (n, 2) keys that are absent. A key counts as present if both its halves occur: a
        false hit is found when it is read.
        """
        if not len(keys):
            return keys
        high = np.sort(keys[:, 0])  # sorted, so that memory is accessed in order; unique is slower
        at = np.searchsorted(self._high, high)
        there = np.zeros(len(high), bool)
        inside = at < len(self._high)
        there[inside] = self._high[at[inside]] == high[inside]
        absent = high[~there]
        return keys[np.isin(keys[:, 0], absent)] if len(absent) else keys[:0]


class Store:
    """A folder, local or remote, of content-addressed records by kind ("latents", "text", "patches") and key
    (32 hexadecimal digits).
    """

    def __init__(self, folder: Path | str, shard_bytes: int = SHARD_BYTES):
        """Raise UserError if the folder cannot be made."""
        self.files = Folder(folder)
        self.folder = self.files.local
        self.converted = 0  # records moved from the layout of earlier versions
        self._shard_bytes = shard_bytes
        self._writers: dict[str, ShardWriter] = {}
        self._unsealed: set[tuple[str, str]] = set()
        self._index: dict[str, _Index] = {}
        self._known: set[str] = set()
        self._listed: int | None = None
        self._touched = 0
        self._lock = RLock()
        self._old = any((self.folder / kind).is_dir() for kind in ("latents", "text", "patches"))
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the folder, which is opened anew."""
        return {"folder": self.files.name, "shard_bytes": self._shard_bytes}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Store.__init__(self, state["folder"], state["shard_bytes"])

    def refresh(self) -> None:
        """Find the shards that this or other processes have completed since."""
        with self._lock:
            place = self.folder / PART
            if not self.files.remote:
                stamp = place.stat().st_mtime_ns if place.is_dir() else 0
                if stamp == self._listed:
                    return
                self._listed = stamp
            names = self.files.names(PART)
            fresh = [name for name in names if name.endswith(".index") and name not in self._known]
            self._known.update(fresh)
            added: dict[str, list[tuple[Shard, np.ndarray]]] = {}
            for name in fresh:
                shard = self._shard(name)
                if shard is not None:
                    added.setdefault(shard.kind, []).append((shard, self._sound_rows(shard)))
            for kind, shards in added.items():
                self._index.setdefault(kind, _Index()).add(shards)

    def _shard(self, name: str) -> Shard | None:
        path = self.files.get(name)
        try:
            return Shard(self.files, name, path) if path else None
        except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError):
            return None  # a damaged index: its records are absent

    def _sound_rows(self, shard: Shard) -> np.ndarray:
        """Return the rows of a shard without those known to be damaged."""
        rows = np.arange(len(shard))
        path = self.files.fresh(f"{shard.name}.damaged")
        if path is None:
            return rows
        bad = {int(line) for line in path.read_text(encoding="utf-8").split()}
        return np.array([row for row in rows if row not in bad], dtype=np.int64)

    def old_path(self, kind: str, key: str) -> Path:
        """Return where earlier versions kept a record."""
        return self.folder / kind / key[:2] / f"{key}.safetensors"

    def read(self, kind: str, key: str) -> Tensors | None:
        """Return the tensors of a key, or None if there are none or they are damaged."""
        with self._lock:
            if (kind, key) in self._unsealed:
                self.seal()
            places = list(self._index[kind].find(key)) if kind in self._index else []
        for shard, row in places:
            tensors = shard.read(row)
            if tensors is not None:
                self._count(tensors)
                return tensors
        return _read_old(self.old_path(kind, key)) if self._old else None

    def _count(self, tensors: Tensors) -> None:
        self._touched += sum(tensor.nbytes + _AROUND for tensor in tensors.values())
        if self._touched > RELEASE_BYTES:
            self._touched = 0
            for index in self._index.values():
                for shard in index.shards:
                    shard.release()

    def has(self, kind: str, key: str) -> bool:
        """Return whether a record exists undamaged; one of the earlier layout is moved to a shard."""
        with self._lock:
            if (kind, key) in self._unsealed:
                return True
            tensors = self.read(kind, key)
            if tensors is None:
                self.refresh()
                tensors = self.read(kind, key)
            if tensors is None:
                return False
            if self._old and not self._in_shards(kind, key):
                self.write(kind, key, tensors)
                self.converted += 1
            return True

    def _in_shards(self, kind: str, key: str) -> bool:
        return kind in self._index and any(True for _ in self._index[kind].find(key))

    def missing(self, kind: str, keys: np.ndarray) -> np.ndarray:
        """Return those of (n, 2) keys, as ``shards.halves`` gives them, that no shard holds."""
        return self._index[kind].missing(keys) if kind in self._index else keys

    def nbytes(self, kind: str) -> int:
        """Return the size in bytes of all shards of a kind."""
        return sum(shard.bytes for shard in self._index[kind].shards) if kind in self._index else 0

    def write(self, kind: str, key: str, tensors: Tensors) -> int:
        """Add a record and return its size in bytes; it is in a shard after ``seal`` at the latest.

        Raises OSError where the disk refuses.
        """
        with self._lock:
            writer = self._writers.setdefault(kind, ShardWriter(self.files, kind, self._shard_bytes))
            self._unsealed.add((kind, key))
            if writer.add(key, tensors) is not None:
                # what began the next shard, if anything did, is this record
                own = {pair for pair in self._unsealed if pair[0] == kind}
                self._unsealed -= own if writer.is_empty else own - {(kind, key)}
                self.refresh()
        return sum(tensor.nbytes for tensor in tensors.values())

    def seal(self) -> None:
        """Complete the shards that this process is writing."""
        with self._lock:
            for writer in self._writers.values():
                writer.seal()
            self._unsealed.clear()
            self.refresh()

    def abandon(self) -> None:
        """Leave unfinished shards for the next process to salvage: after an error of the disk."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers, self._unsealed = {}, set()

    def salvage(self) -> int:
        """Take over unfinished shards of dead processes; return the number of records."""
        saved = salvage(self.files)
        self.refresh()
        return saved

    def discard(self, kind: str, key: str) -> None:
        """Mark a record as damaged for every process that opens the store from now on."""
        for shard, row in self._index[kind].find(key) if kind in self._index else ():
            self.files.append(f"{shard.name}.damaged", str(row))
        self.old_path(kind, key).unlink(missing_ok=True)


def _read_old(path: Path) -> Tensors | None:
    """Return the tensors of a file of the earlier layout, None if it is absent or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return tensors if (file.metadata() or {}).get("digest") == tensors_digest(tensors) else None
    except (OSError, SafetensorError):
        return None


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of names, types, shapes and values."""
    parts: list[bytes] = []
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), tensor.numpy().tobytes()]
    return digest(*parts)


def is_full(error: OSError) -> bool:
    """Return whether an error of writing means that the disk, or the user's quota, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_space(folder: Path, needed: int) -> UserError:
    """Return the error of a full disk: the folder, the bytes needed and the bytes free."""
    free = shutil.disk_usage(folder).free
    return UserError(
        f"no space left in {folder}: about {needed / 2**20:.1f} MiB more are needed, "
        f"{free / 2**20:.1f} MiB are free; "
        f"make room or set data.cache_dir to another disk (what is there already is kept)"
    )


class Memory:
    """A store with a cache of the last used tensors in memory, up to ``budget`` bytes.

    They are float32, integers as they are. Threads may share it.
    """

    def __init__(self, store: Store, budget: int = 512 * 2**20):
        self.store = store
        self._budget = budget
        self._held: OrderedDict[tuple[str, str], Tensors] = OrderedDict()
        self._bytes = 0
        self._lock = RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the store and the budget."""
        return {"store": self.store, "budget": self._budget}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        Memory.__init__(self, state["store"], state["budget"])

    def get(self, kind: str, key: str) -> Tensors:
        """Return the tensors of a key; UserError if they were removed or damaged since encoding."""
        with self._lock:
            if (kind, key) in self._held:
                self._held.move_to_end((kind, key))
                return self._held[kind, key]
        stored = self.store.read(kind, key)
        if stored is None:
            self.store.discard(kind, key)
            raise UserError(
                f"{self.store.files}: {kind} {key} missing or damaged since it was encoded; "
                f"start again and it will be encoded anew"
            )
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in stored.items()}
        with self._lock:
            if (kind, key) not in self._held:
                self._held[kind, key] = tensors
                self._bytes += _bytes(tensors)
            while self._bytes > self._budget and len(self._held) > 1:
                self._bytes -= _bytes(self._held.popitem(last=False)[1])
        return tensors


def _bytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
