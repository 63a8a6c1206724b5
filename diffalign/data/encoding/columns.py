"""Records of an encoded set as the columns of an Arrow table, memory-mapped from its manifest.

A ``Record`` is made from a row when it is read; properties of the whole set (buckets, labels, counts) are
computed from columns. So a set of a million pairs needs no Python object for each pair.
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.encoding.records import SCHEMA, Bucket, Record, batches_of, record_from
from diffalign.data.encoding.shards import halves
from diffalign.errors import UserError

RELEASE_ROWS = 64  # after so many single rows the system may release the pages of the file


class Columns(Sequence[Record]):
    """Some rows of a table of ``SCHEMA``, in any order."""

    def __init__(self, table: pa.Table, rows: np.ndarray | None = None, mapped: mmap.mmap | None = None):
        """``rows`` (n,) are row numbers of the table; None: all.

        ``mapped`` is the memory-mapped file of the table, if any.
        """
        self.table = table
        self._mapped = mapped
        self._read = 0
        self._rows = rows
        self._whole = self if rows is None else Columns(table)

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Columns":
        """Return the columns of some records."""
        return cls(pa.Table.from_batches(batches_of(records), SCHEMA))

    def take(self, indices: Iterable[int]) -> "Columns":
        """Return these rows, which share the table and its cached properties."""
        chosen = np.fromiter(indices, np.int64) if not isinstance(indices, np.ndarray) else indices
        if (
            self._rows is None
            and len(chosen) == self.table.num_rows
            and (chosen == np.arange(len(chosen))).all()
        ):
            return self
        part = Columns(self.table, chosen if self._rows is None else self._rows[chosen])
        part._whole = self._whole
        return part

    @classmethod
    def joined(cls, parts: Iterable["Columns"]) -> "Columns":
        """Return the rows of all parts, one after the other."""
        tables = [
            part.table if part._rows is None else part.table.take(pa.array(part._rows)) for part in parts
        ]
        return cls(pa.concat_tables([SCHEMA.empty_table(), *tables]))

    @property
    def whole(self) -> "Columns":
        """All rows of the table."""
        return self._whole

    @property
    def rows(self) -> np.ndarray:
        """(n,) the numbers of these rows in the table."""
        return np.arange(self.table.num_rows) if self._rows is None else self._rows

    def column(self, name: str) -> pa.ChunkedArray:
        """Return the cells of a column in these rows."""
        column = self.table[name]
        return column if self._rows is None else column.take(pa.array(self._rows))

    def with_column(self, name: str, cells: pa.Array) -> "Columns":
        """Return a table of these rows whose column ``name`` has other cells, one a row."""
        table = self.table if self._rows is None else self.table.take(pa.array(self._rows))
        at = SCHEMA.names.index(name)
        return Columns(table.set_column(at, SCHEMA.field(name), cells.cast(SCHEMA.field(name).type)))

    def __len__(self) -> int:
        return self.table.num_rows if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Return a record, or a tuple of them."""
        if isinstance(index, slice):
            return tuple(self[at] for at in range(len(self))[index])
        at = range(len(self))[index]
        row = at if self._rows is None else int(self._rows[at])
        batches, ends = self._whole._batches  # slicing a table of many batches costs time for each of them
        number = int(np.searchsorted(ends, row, side="right"))
        first = int(ends[number - 1]) if number else 0
        self._whole._read += 1
        if self._whole._read == RELEASE_ROWS:  # once: the allocator keeps what opening a large set has copied
            pa.default_memory_pool().release_unused()
        if self._whole._read % RELEASE_ROWS == 0:
            self.release()
        return record_from(batches[number].slice(row - first, 1).to_pylist()[0])

    def __getstate__(self) -> dict[str, Any]:
        """Pickle a copy of the table, without the file."""
        return {**self.__dict__, "_mapped": None}

    def release(self) -> None:
        """Let the system release the pages of the file that reading has mapped."""
        if self._whole._mapped is not None:
            self._whole._mapped.madvise(mmap.MADV_DONTNEED)

    def __iter__(self) -> Iterator[Record]:
        for first in range(0, len(self), 256):  # by slices, which is ten times faster than by rows
            span = range(first, min(first + 256, len(self)))
            if self._rows is None:
                part = self.table.slice(first, len(span))
            else:
                part = self.table.take(pa.array(self._rows[first : first + len(span)]))
            yield from map(record_from, part.to_pylist())

    def every_image(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (m,) and (m, 1): for every image of the groups (n,) its group and number there."""
        sizes = self.sizes[groups]
        starts = np.cumsum(sizes) - sizes
        return np.repeat(groups, sizes), (np.arange(int(sizes.sum())) - np.repeat(starts, sizes))[:, None]

    def cells(self, name: str, groups: np.ndarray, picks: np.ndarray) -> np.ndarray:
        """Return where picked cells of a list column are among all of its cells in the whole table.

        Args:
            name: of the column.
            groups: (m,) int: the group of each.
            picks: (m, k) int: their numbers in the group's list.

        Returns:
            (m, k) int.
        """
        lengths = _numbers(pc.list_value_length(self.whole.table[name])).astype(np.int64)
        starts = np.cumsum(lengths) - lengths
        return np.asarray(starts[self.rows[groups]][:, None] + picks)

    @cached_property
    def _batches(self) -> tuple[list[pa.RecordBatch], np.ndarray]:
        """The record batches of the table, and the number of rows up to the end of each."""
        batches = self.table.to_batches()
        return batches, np.cumsum([batch.num_rows for batch in batches], dtype=np.int64)

    def _pick(self, values: np.ndarray) -> np.ndarray:
        return values if self._rows is None else values[self._rows]

    @cached_property
    def sizes(self) -> np.ndarray:
        """(n,) int: images of each group."""
        if self._rows is not None:
            return self._pick(self._whole.sizes)
        return _numbers(pc.list_value_length(self.table["images"]))

    @property
    def text_counts(self) -> np.ndarray:
        """(n,) int: prompts of each group's images of their own, 0 where they share one."""
        return self._pick(_numbers(pc.list_value_length(self.table["texts"])))

    @cached_property
    def starts(self) -> np.ndarray:
        """(n,) int: the number of images before each group's."""
        return np.asarray(np.cumsum(self.sizes) - self.sizes)

    @cached_property
    def buckets(self) -> np.ndarray:
        """(n, 3) int: the bucket of each group."""
        if self._rows is not None:
            return self._pick(self._whole.buckets)
        images = pc.list_flatten(self.table["images"])
        target = _numbers(pc.list_flatten(pc.struct_field(images, "target"))).reshape(-1, 2)
        frames = _numbers(pc.struct_field(images, "frames"))
        return np.column_stack([target[self.starts], frames[self.starts]]).astype(np.int64).reshape(-1, 3)

    @cached_property
    def bucket_codes(self) -> tuple[list[Bucket], np.ndarray]:
        """The buckets that occur, sorted, and (n,) the number of each group's."""
        # one number for three, each below 2^21: unique of rows is slow
        height, width, frames = self.buckets.T
        values, codes = np.unique((height << 42) | (width << 21) | frames, return_inverse=True)
        low = (1 << 21) - 1
        return [(int(v >> 42), int((v >> 21) & low), int(v & low)) for v in values], codes.reshape(-1)

    @cached_property
    def kinds(self) -> np.ndarray:
        """(n,) str: what each group counts as (``Record.kind``)."""
        if self._rows is not None:
            return self._pick(self._whole.kinds)
        lowest, highest, first = self._extremes
        labels = _numbers(pc.list_value_length(self.table["scores"]))
        kinds = np.where(self.sizes == 2, "pair", np.full(len(self), "list", dtype="<U8"))
        kinds[_numbers(pc.list_value_length(self.table["texts"])) > 0] = "caption"
        single = self.sizes == 1
        kinds[single] = np.where(first[single] > 0, "liked", "disliked")
        kinds[(labels > 1) & (lowest == highest)] = "tie"
        for row in np.flatnonzero(self.has_dense):
            kinds[row] = self[int(row)].kind
        return kinds

    @cached_property
    def _extremes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n,) each: lowest, highest and first score of the groups; 0 where there are no scores."""
        lengths = _numbers(pc.list_value_length(self.table["scores"])).astype(np.int64)
        values = _numbers(pc.list_flatten(self.table["scores"]))
        found = [np.zeros(len(lengths)) for _ in range(3)]
        some = lengths > 0
        if some.any():
            starts = (np.cumsum(lengths) - lengths)[some]
            found[0][some] = np.minimum.reduceat(values, starts)
            found[1][some] = np.maximum.reduceat(values, starts)
            found[2][some] = values[starts]
        return found[0], found[1], found[2]

    @cached_property
    def first_scores(self) -> np.ndarray:
        """(n,) float64: the score of each group's first image."""
        return self._pick(self._whole._extremes[2])

    @property
    def spreads(self) -> np.ndarray:
        """(n,) float64: highest score of each group minus the lowest; 0 without scores."""
        lowest, highest, _ = self._whole._extremes
        return self._pick(highest - lowest)

    @cached_property
    def has_dense(self) -> np.ndarray:
        """(n,) bool: whether a group has labels in time."""
        if self._rows is not None:
            return self._pick(self._whole.has_dense)
        return pc.is_valid(self.table["dense"]).to_numpy()

    @cached_property
    def weights(self) -> np.ndarray:
        """(n,) float64: the weight of each group."""
        return self._pick(self.table["weight"].to_numpy())

    @cached_property
    def has_votes(self) -> bool:
        """Whether a group has votes."""
        if self._rows is not None and not self._whole.has_votes:
            return False
        return bool((self._pick(_numbers(pc.list_value_length(self.table["votes"]))) > 0).any())

    @cached_property
    def intervals(self) -> int:
        """Intervals of time that pairs have labels for, 0 where none has any.

        Raises:
            UserError: pairs with different numbers of them.
        """
        counts = self._pick(_numbers(pc.list_value_length(self.table["time_labels"])))
        found = sorted(set(counts[counts > 0].tolist()))
        if len(found) > 1:
            raise UserError(f"pairs have {found} time_labels each; allowed: one number of them in a set")
        return int(found[0]) if found else 0

    @cached_property
    def reward_counts(self) -> np.ndarray:
        """(n,) int: rewards an image, 0 where there are none."""
        if self._rows is not None:
            return self._pick(self._whole.reward_counts)
        rows = _numbers(pc.list_value_length(self.table["rewards"])).astype(np.int64)
        inner = _numbers(pc.list_value_length(pc.list_flatten(self.table["rewards"])))
        counts, some = np.zeros(len(rows), np.int64), rows > 0
        counts[some] = inner[(np.cumsum(rows) - rows)[some]]
        return counts

    @cached_property
    def has_source(self) -> np.ndarray:
        """(n,) bool: whether a group has a source image."""
        if self._rows is not None:
            return self._pick(self._whole.has_source)
        return np.asarray(pc.is_valid(self.table["source"]).to_numpy())

    @cached_property
    def has_patches(self) -> bool:
        """Whether a group has a weight map."""
        if self._rows is not None:  # of a part: only its rows count
            part = self.table.select(["patches"]).take(pa.array(self._rows))
            return bool(pc.any(pc.is_valid(pc.list_flatten(part["patches"]))).as_py())
        return bool(pc.any(pc.is_valid(pc.list_flatten(self.table["patches"]))).as_py())

    @cached_property
    def prompts(self) -> tuple[list[str], np.ndarray]:
        """The distinct prompts in the order of their first group, and (n,) the number of each group's."""
        column = self.table["prompt"]
        if self._rows is not None:
            column = column.take(pa.array(self._rows))
        coded = column.combine_chunks().dictionary_encode()
        if isinstance(coded, pa.ChunkedArray):
            coded = coded.unify_dictionaries().combine_chunks()
        return coded.dictionary.to_pylist(), coded.indices.to_numpy()

    def keys(self) -> dict[str, np.ndarray]:
        """Return the keys that the whole table needs, by kind: (m, 2) each (``shards.halves``)."""
        images, source = pc.list_flatten(self.table["images"]), self.table["source"].drop_null()
        parts = {
            "text": [self.table["text"], pc.list_flatten(self.table["texts"]), self.table["empty"]],
            "sources": [pc.struct_field(source, "key"), pc.struct_field(source, "flipped")],
            "latents": [pc.struct_field(images, "key"), pc.struct_field(images, "flipped")],
            "patches": [pc.list_flatten(self.table["patches"])],
        }
        found = {}
        for kind, columns in parts.items():
            found[kind] = np.concatenate([halves(column.drop_null()) for column in columns])
        return found


def _numbers(column: Any) -> np.ndarray:
    return column.to_numpy() if len(column) else np.zeros(0, np.int64)
