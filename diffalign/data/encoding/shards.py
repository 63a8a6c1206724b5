"""Shards: Arrow IPC files of tensors by key, each with an index.

A shard holds records of one kind (latents, text, patches) with the same tensors by name: columns ``key``
(16 bytes) and, for each tensor, ``NAME`` (its bytes) and ``NAME.shape``. Its index, an Arrow IPC file as
well, has a row for each record: the key, a checksum, and where in the shard each tensor's bytes begin. A
shard is complete when it has an index; the index is written last and renamed into place.

Reading needs no parsing: the shard is memory-mapped, and an index row says where the bytes are. The checksum
(xxh3, 64 bits) is over names, types, shapes and bytes, so that damage to either file is found.

While it is written a shard is a hidden file, locked by its process. An unlocked one was left by a process
that died: its complete record batches become a shard (``salvage``).
"""

import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from diffalign.data.encoding.folder import Folder
from diffalign.utils.lock import try_lock

Tensors = dict[str, Tensor]

PART = "shards"  # subfolder
SHARD_BYTES = 256 * 2**20  # a shard is completed at this size
BATCH_BYTES = 8 * 2**20  # of a record batch: a killed process loses at most so many
BATCH_ROWS = 4096
PARTIAL = ".partial"
_MAGIC = 8  # bytes of an IPC file before its stream begins
_PAGE = mmap.ALLOCATIONGRANULARITY


class Shard:
    """A complete shard, memory-mapped when it is first read."""

    def __init__(self, folder: Folder, name: str, index: Path):
        """``name`` is that of the index, relative to the folder.

        Raises pyarrow.ArrowException, OSError, ValueError or KeyError if the index is damaged.
        """
        self.name = name.removesuffix(".index")
        self.kind = self.name.split("/")[-1].rsplit("-", 1)[0]
        self._folder = folder
        table = pa.ipc.open_file(pa.memory_map(str(index))).read_all().combine_chunks()
        meta = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        self.bytes = int(meta["bytes"])
        self._dtypes = {
            name.removeprefix("dtype "): getattr(torch, value)
            for name, value in sorted(meta.items())
            if name.startswith("dtype ")
        }
        self.keys = halves(table["key"])
        self._checksums = table["checksum"].to_numpy()
        self._places = {
            name: (table[name].to_numpy(), table[f"{name}.shape"].combine_chunks()) for name in self._dtypes
        }
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> Tensors | None:
        """Return the tensors of a row, copied; None if they do not match the checksum or are not there."""
        try:
            buffer = self._mapped()
            checksum = xxhash.xxh3_64()
            tensors = {}
            for name, dtype in self._dtypes.items():
                offsets, shapes = self._places[name]
                shape, offset = tuple(shapes[row].as_py()), int(offsets[row])
                count = int(np.prod(shape, dtype=np.int64))
                size = count * dtype.itemsize
                if offset < 0 or size < 0 or offset + size > len(buffer):
                    return None
                start = offset // _PAGE * _PAGE
                if size > 2**16:
                    buffer.madvise(mmap.MADV_WILLNEED, start, offset + size - start)
                checksum.update(_described(name, dtype, shape))
                checksum.update(memoryview(buffer)[offset : offset + size])
                view = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset) if count else None
                tensors[name] = torch.zeros(shape, dtype=dtype) if view is None else view.view(shape).clone()
        except (OSError, ValueError):
            return None
        return tensors if checksum.intdigest() == int(self._checksums[row]) else None

    def nbytes(self, row: int) -> int:
        """Return the size of a row's tensors in bytes."""
        shapes = ((dtype, self._places[name][1][row].as_py()) for name, dtype in self._dtypes.items())
        return sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in shapes)

    def release(self) -> None:
        """Let the system release the pages that reading has mapped."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            path = self._folder.get(f"{self.name}.arrow")
            if path is None:
                raise FileNotFoundError(self.name)
            with path.open("rb") as file:  # private mapping: torch requires writable memory
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._map.madvise(mmap.MADV_RANDOM)
        return self._map


def halves(column: pa.ChunkedArray) -> np.ndarray:
    """Return (n, 2) uint64 of a column of 16-byte keys without nulls: high and low half."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    if not len(array):
        return np.zeros((0, 2), np.uint64)
    raw = np.frombuffer(array.buffers()[1], ">u8", 2 * len(array), 16 * array.offset)
    return raw.astype(np.uint64).reshape(-1, 2)


def _described(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{name} {dtype} {shape}".encode()


@dataclass
class _Row:
    """A buffered record."""

    key: bytes
    tensors: Tensors
    nbytes: int


class ShardWriter:
    """Writes records of one kind into shards; the records of a layout (names and types) share one."""

    def __init__(self, folder: Folder, kind: str, shard_bytes: int = SHARD_BYTES):
        self._folder, self._kind, self._limit = folder, kind, shard_bytes
        self._layout: tuple[tuple[str, torch.dtype], ...] = ()
        self._rows: list[_Row] = []
        self._waiting = self._written = 0
        self._path: Path | None = None
        self._lock = -1
        self._file: Any = None
        self._checksums: dict[bytes, int] = {}

    @property
    def is_empty(self) -> bool:
        """Whether no record is buffered and no shard is open."""
        return self._file is None and not self._rows

    def add(self, key: str, tensors: Tensors) -> str | None:
        """Add a record; return the name of the shard that it completed, if any. OSError if the disk is
        full."""
        layout = tuple((name, tensors[name].dtype) for name in sorted(tensors))
        done = self.seal() if self._layout and layout != self._layout else None
        self._layout = layout
        row = _Row(bytes.fromhex(key), tensors, sum(tensor.nbytes for tensor in tensors.values()))
        checksum = xxhash.xxh3_64()
        for name, dtype in layout:
            checksum.update(_described(name, dtype, tuple(tensors[name].shape)))
            checksum.update(_bytes(tensors[name]))
        self._checksums[row.key] = checksum.intdigest()
        self._rows.append(row)
        self._waiting += row.nbytes
        if self._waiting >= min(BATCH_BYTES, self._limit) or len(self._rows) >= BATCH_ROWS:
            self.flush()
        return self.seal() if self._written >= self._limit else done

    def flush(self) -> None:
        """Write the buffered records as a record batch."""
        if not self._rows:
            return
        if self._file is None:
            self._open()
        columns = [pa.array([row.key for row in self._rows], pa.binary(16))]
        for name, _ in self._layout:
            columns.append(pa.array([_bytes(row.tensors[name]) for row in self._rows], pa.large_binary()))
            shapes = [list(row.tensors[name].shape) for row in self._rows]
            columns.append(pa.array(shapes, pa.list_(pa.int32())))
        self._file.write_batch(pa.record_batch(columns, schema=_schema(self._layout)))
        self._written += self._waiting
        self._rows, self._waiting = [], 0

    def seal(self) -> str | None:
        """Complete the shard and write its index; return the shard's name, None if it held nothing."""
        self.flush()
        if self._file is None or self._path is None:
            return None
        self._file.close()
        name = f"{PART}/{self._kind}-{uuid4().hex}"
        index = self._folder.temporary(PART, ".index.tmp")
        _write_index(self._path, index, self._checksums)
        self._folder.put(self._path, f"{name}.arrow")
        self._folder.put(index, f"{name}.index")
        self._close()
        return name

    def abandon(self) -> None:
        """Leave the shard unfinished; the next process that opens the store salvages it."""
        if self._file is not None:
            self._close()

    def _open(self) -> None:
        created = self._folder.temporary(PART, ".tmp")
        self._path = created.with_name(f".{self._kind}-{uuid4().hex}{PARTIAL}")
        windows = os.name == "nt"  # renames no open file
        self._lock = os.open(self._path if windows else created, os.O_CREAT | os.O_RDWR)
        try_lock(self._lock)
        if not windows:
            os.replace(created, self._path)
        self._file = pa.ipc.new_file(pa.OSFile(str(self._path), "wb"), _schema(self._layout))

    def _close(self) -> None:
        os.close(self._lock)
        self._file, self._path, self._lock, self._written = None, None, -1, 0
        self._checksums = {row.key: self._checksums[row.key] for row in self._rows}


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _schema(layout: tuple[tuple[str, torch.dtype], ...]) -> pa.Schema:
    fields = [pa.field("key", pa.binary(16))]
    for name, dtype in layout:
        kind = {"dtype": str(dtype).removeprefix("torch.")}
        fields.append(pa.field(name, pa.large_binary(), metadata=kind))
        fields.append(pa.field(f"{name}.shape", pa.list_(pa.int32())))
    return pa.schema(fields)


def _write_index(shard: Path, index: Path, checksums: Mapping[bytes, int]) -> None:
    """Write the index of a complete shard: Arrow says where in the file each tensor's bytes begin."""
    buffer = pa.memory_map(str(shard)).read_buffer()
    reader = pa.ipc.open_file(buffer)
    names = [field.name for field in reader.schema if field.type == pa.large_binary()]
    columns: dict[str, list[Any]] = {name: [] for name in reader.schema.names}
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        columns["key"].append(batch.column("key"))
        for name in names:
            column = batch.column(name)
            _, offsets, values = column.buffers()
            begin = values.address - buffer.address if values is not None and values.size else 0
            starts = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)[:-1]
            columns[name].append(pa.array(starts + begin))
            columns[f"{name}.shape"].append(batch.column(f"{name}.shape"))
    meta = {"bytes": str(buffer.size)}
    for name in names:
        meta[f"dtype {name}"] = reader.schema.field(name).metadata[b"dtype"].decode()
    arrays = {name: pa.concat_arrays(parts) for name, parts in columns.items()}
    keys = arrays["key"].to_pylist()
    arrays["checksum"] = pa.array([checksums[key] for key in keys], pa.uint64())
    table = pa.table(arrays).replace_schema_metadata(meta)
    with pa.ipc.new_file(pa.OSFile(str(index), "wb"), table.schema) as file:
        file.write_table(table)


def salvage(folder: Folder) -> int:
    """Make shards of the unfinished files of dead processes; return the number of saved records."""
    saved = 0
    place = folder.local / PART
    for path in sorted(place.glob(f".*{PARTIAL}")) if place.is_dir() else []:
        try:
            lock = os.open(path, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            # locked: its process is alive; missing: another process has salvaged it
            if alone := try_lock(lock) and path.exists():
                writer = ShardWriter(folder, path.name[1:].rsplit("-", 1)[0])
                for key, tensors in _complete(path):
                    writer.add(key, tensors)
                    saved += 1
                writer.seal()
                if os.name != "nt":
                    path.unlink()
        finally:
            os.close(lock)
        if alone and os.name == "nt":  # removes no open file
            path.unlink(missing_ok=True)
    return saved


def _complete(path: Path) -> Iterator[tuple[str, Tensors]]:
    """Yield the records of the complete batches of an unfinished shard."""
    with pa.OSFile(str(path), "rb") as file:
        if file.size() <= _MAGIC:
            return
        file.seek(_MAGIC)
        try:
            reader = pa.ipc.open_stream(file)
            names = [field.name for field in reader.schema if field.type == pa.large_binary()]
            dtypes = [getattr(torch, reader.schema.field(n).metadata[b"dtype"].decode()) for n in names]
            for batch in reader:
                for row in range(batch.num_rows):
                    tensors = {}
                    for name, dtype in zip(names, dtypes, strict=True):
                        data = bytearray(batch.column(name)[row].as_py())
                        shape = batch.column(f"{name}.shape")[row].as_py()
                        tensors[name] = (
                            torch.frombuffer(data, dtype=dtype).view(shape)
                            if data
                            else torch.zeros(shape, dtype=dtype)
                        )
                    yield batch.column("key")[row].as_py().hex(), tensors
        except (pa.ArrowException, OSError, EOFError):  # cut off in the middle of a batch
            return
