"""An encoded preference set, which training reads in place of images and prompts.

The manifest is an Arrow IPC file: a version, the keys that all groups share and the counts as metadata, and
a row for each group (``columns``). The rows are keys into the store, which holds the tensors.
"""

import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.folder import Folder
from diffalign.data.encoding.records import SCHEMA, Bucket, EncodedImage, Record
from diffalign.data.encoding.store import Memory, Store, Tensors
from diffalign.data.reading.examples import Counts
from diffalign.diffusion.randomness import derive_each

__all__ = ["Bucket", "EncodedImage", "EncodedSet", "Record", "Shared", "split_holdout"]

VERSION = 7
THOROUGH_BYTES, THOROUGH_ROWS = 2 * 2**30, 2**15  # up to this size all tensors are checked on opening


@dataclass(frozen=True)
class Shared:
    """Keys of tensors for all groups: the embeddings of the empty prompt and of the negative conditions."""

    empty: str
    negative: str


class EncodedSet(Sequence[Record]):
    """Records in the order of the rows, and their tensors, which are read on demand and cached in memory up
    to a budget.

    Attributes:
        records: the groups.
        shared: keys of tensors for all groups.
        counts: usable groups and ties among ``records``; rows dropped in the whole set.
        dense: whether labels are dense, those of the whole set alike: a global one counts for all frames.
    """

    def __init__(
        self,
        records: Columns,
        shared: Shared,
        counts: Counts,
        memory: Memory,
        also: Callable[[str], Tensors] | None = None,
        dense: bool | None = None,
    ):
        """``also`` gives further tensors of a prompt, which then are in its ``text``; ``dense`` is whether
        labels are, None: if those of a record are.
        """
        self.records = records
        self.dense = bool(records.has_dense.any()) if dense is None else dense
        self.counts = counts
        self.shared = shared
        self._memory = memory
        self._also = also

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """Return a record, or a tuple of them."""
        return self.records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def moments(self, image: EncodedImage, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, std) of the VAE posterior, (C, H, W) or (C, F, H, W), float32 in the scale that the network
        trains on.
        """
        key = image.flipped if flipped else image.key
        if key is None:
            raise ValueError("the set was encoded without flips")
        tensors = self._memory.get("latents", key)
        return tensors["mean"], tensors["std"]

    def text(self, record: Record, image: int = 0) -> Tensors:
        """Return the embedding of an image's prompt by name, each without a batch axis, float32."""
        text = self._memory.get("text", record.texts[image] if record.texts else record.text)
        return text if self._also is None else {**text, **self._also(record.prompt)}

    def empty_text(self, record: Record) -> Tensors:
        """Return the embedding of the empty prompt, as ``text``."""
        return self._memory.get("text", record.empty or self.shared.empty)

    def negative_text(self, record: Record) -> Tensors:
        """Return the embedding of the negative conditions, as ``text``; of a prompt that is encoded together
        with its source, that of the empty prompt with this source.
        """
        return self._memory.get("text", record.empty or self.shared.negative)

    def source(self, record: Record, flipped: bool = False) -> Tensors:
        """Return the conditions of a group's source by name, without a batch axis; none where it has none."""
        if record.source is None:
            return {}
        key = record.source.flipped if flipped else record.source.key
        if key is None:
            raise ValueError("the set was encoded without flips")
        return self._memory.get("sources", key)

    def weights(self, record: Record, image: int, flipped: bool = False) -> Tensor:
        """Return the weight map of an image, (1, H, W) of its latents' size, or of a video, (1, F, H, W), one
        picture for all frames: ones where it has none.
        """
        key = record.patches[image] if record.patches else None
        latents = self.moments(record.images[image])[0]
        if key is None:
            return torch.ones_like(latents[:1])
        weights = self._memory.get("patches", key)["weights"]
        weights = weights.flip(-1) if flipped else weights
        return weights if latents.ndim == 3 else weights[:, None].expand(-1, latents.shape[1], -1, -1)

    @cached_property
    def extras(self) -> frozenset[str]:
        """Names of the data besides labels in the batches of this set: some of ``reward``, ``patches``,
        ``weight``, ``votes``, ``time_labels``.

        They are those of the whole set, so that every batch on every rank has the same names.
        """
        there = {
            "reward": bool(len(self)) and bool((self.records.reward_counts > 0).all()),
            "patches": self.records.has_patches,
            "weight": bool((self.records.weights != 1).any()),
            "votes": self.records.has_votes,
            "time_labels": self.records.intervals > 0,
        }
        return frozenset(name for name, holds in there.items() if holds)

    def scores(self, record: Record, image: int) -> list[float]:
        """Return the score of an image, or of each latent frame of a video where labels are dense."""
        if not self.dense:
            return [record.scores[image]]
        if record.dense:
            return record.dense.per_frame(image)
        return [record.scores[image]] * self.moments(record.images[image])[0].shape[1]

    def subset(self, indices: Iterable[int]) -> "EncodedSet":
        """Return the set of these records, sharing tensors with this one."""
        return self._with(self.records.take(indices), self.dense)

    def holding(self, records: Iterable[Record], dense: bool | None = None) -> "EncodedSet":
        """Return a set of other records over the same tensors."""
        return self._with(records if isinstance(records, Columns) else Columns.of(records), dense)

    def counted(self, counts: Counts) -> "EncodedSet":
        """Return the set with other counts."""
        return EncodedSet(self.records, self.shared, counts, self._memory, self._also, self.dense)

    def recounted(self) -> "EncodedSet":
        """Return the set with its groups counted anew; counts of dropped rows are kept."""
        return self._with(self.records, self.dense)

    def _with(self, columns: Columns, dense: bool | None) -> "EncodedSet":
        labels = (columns[int(row)].dense for row in np.flatnonzero(columns.has_dense))
        counts = self.counts.of(columns.kinds.tolist(), (label for label in labels if label))
        return EncodedSet(columns, self.shared, counts, self._memory, self._also, dense)

    def saying(self, also: Callable[[str], Tensors]) -> "EncodedSet":
        """Return the set with further tensors in every ``text``, made of the prompt by ``also``."""
        return EncodedSet(self.records, self.shared, self.counts, self._memory, also, self.dense)


def split_holdout(
    encoded: EncodedSet, share: float, maximum: int, seed: int
) -> tuple[EncodedSet, EncodedSet]:
    """Return (train, held out): at most ``share`` of the groups and ``maximum`` of them, no prompt in both,
    never all.

    Prompts are taken in an order drawn by ``seed`` and their text, each with all its groups if they still
    fit, so the choice does not depend on the order of the file.
    """
    room = min(int(share * len(encoded)), maximum)
    held = np.zeros(len(encoded), bool)
    if room:
        prompts, codes = encoded.records.prompts
        sizes = np.bincount(codes, minlength=len(prompts))
        order = np.argsort(derive_each(prompts, seed, "holdout"), kind="stable")
        chosen, taken = [], 0
        for number in order:
            if taken == room:
                break
            if taken + sizes[number] <= room:
                taken += int(sizes[number])
                chosen.append(number)
        held = np.isin(codes, chosen)
    return encoded.subset(np.flatnonzero(~held)), encoded.subset(np.flatnonzero(held))


def write_manifest(path: Path, batches: Iterable[pa.RecordBatch], shared: Shared, counts: Counts) -> None:
    """Write the list of an encoded set to a local file."""
    meta = {
        "version": str(VERSION),
        "shared": json.dumps(asdict(shared)),
        "counts": json.dumps(asdict(counts)),
    }
    with pa.ipc.new_file(pa.OSFile(str(path), "wb"), SCHEMA.with_metadata(meta)) as file:
        for batch in batches:
            file.write_batch(batch.replace_schema_metadata(meta))


def read_manifest(files: Folder, name: str, memory: Memory) -> EncodedSet | None:
    """Return the encoded set that a manifest lists, or None if there is none, it is damaged, or a tensor is
    absent.

    Tensors of a small set are read and checked; of larger sets only their presence is checked (damage is
    found when they are read).
    """
    path = files.fresh(name)
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
        table.validate()
        meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if meta["version"] != str(VERSION) or table.schema.names != SCHEMA.names:
            return None
        shared = Shared(**json.loads(meta["shared"]))
        held = json.loads(meta["counts"])
        counts = Counts(**{**held, "skipped": tuple(held["skipped"]), "filtered": ()})
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    if counts.usable + counts.ties != len(table):
        return None
    columns = Columns(table.replace_schema_metadata(None), mapped=mapped)
    return EncodedSet(columns, shared, counts, memory) if all_there(memory.store, columns, shared) else None


def all_there(store: Store, columns: Columns, shared: Shared) -> bool:
    """Return whether every tensor of a set is in a shard; and sound, where the set is small."""
    store.refresh()
    keys = columns.keys()
    own = [[int(key[:16], 16), int(key[16:], 16)] for key in (shared.empty, shared.negative)]
    keys["text"] = np.concatenate([keys["text"], np.array(own, np.uint64)])
    if any(len(store.missing(kind, wanted)) for kind, wanted in keys.items()):
        return False
    if sum(map(len, keys.values())) > THOROUGH_ROWS or sum(map(store.nbytes, keys)) > THOROUGH_BYTES:
        return True
    named = {
        (kind, f"{high:016x}{low:016x}") for kind, wanted in keys.items() for high, low in wanted.tolist()
    }
    return all(store.read(kind, key) is not None for kind, key in named)
