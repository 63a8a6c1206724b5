"""An encoded preference set: what training reads instead of images and prompts.

The manifest is json lines: a header with a version, the "" prompt's key and the counts, then one line a
group. It is a list of keys into the store; the tensors themselves lie there.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from diffalign.data.examples import Counts
from diffalign.data.geometry import Cut, Size
from diffalign.data.store import Memory, Store, Tensors
from diffalign.files import write_atomic
from diffalign.randomness import derive

VERSION = 1


@dataclass(frozen=True)
class EncodedImage:
    """An image of a group: the keys of its posterior's moments, and how it was cut."""

    key: str
    flipped: str | None  # key of the mirrored image's moments, if flips were asked for
    cut: Cut


@dataclass(frozen=True)
class Record:
    """A group: an Example whose images and prompt are encoded (K images, K scores)."""

    prompt: str
    text: str  # key of the prompt's embedding
    images: tuple[EncodedImage, ...]
    scores: tuple[float, ...]
    where: str

    @property
    def target(self) -> Size:
        """(height, width) in pixels, common to the group: its bucket."""
        return self.images[0].cut.target

    @property
    def is_tie(self) -> bool:
        """Whether no image is better than another."""
        return len(self.scores) > 1 and min(self.scores) == max(self.scores)

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(kind, key) of every file that the group needs."""
        images = [key for image in self.images for key in (image.key, image.flipped) if key]
        return [("text", self.text), *(("latents", key) for key in images)]


class EncodedSet(Sequence[Record]):
    """Records in the order of the rows, and their tensors, read when asked for and kept in memory while they
    fit.

    Attributes:
        records: the groups.
        counts: usable groups and ties among ``records``; rows dropped in the whole set.
    """

    def __init__(self, records: Iterable[Record], empty: str, counts: Counts, memory: Memory):
        self.records = tuple(records)
        self.counts = counts
        self._empty = empty
        self._memory = memory

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        """A record, or a tuple of them."""
        return self.records[index]

    def moments(self, image: EncodedImage, flipped: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, std) of the VAE posterior, (C, H, W) float32 in the scale that the network trains on."""
        key = image.flipped if flipped else image.key
        if key is None:
            raise ValueError("the set was encoded without flips")
        tensors = self._memory.get("latents", key)
        return tensors["mean"], tensors["std"]

    def text(self, record: Record) -> Tensors:
        """The prompt's embedding by name, each without a batch axis, float32."""
        return self._memory.get("text", record.text)

    def empty_text(self) -> Tensors:
        """The embedding of the empty prompt, as ``text``."""
        return self._memory.get("text", self._empty)

    def subset(self, indices: Iterable[int]) -> "EncodedSet":
        """The set of these records, sharing tensors with this one."""
        records = [self.records[index] for index in indices]
        ties = sum(record.is_tie for record in records)
        return EncodedSet(
            records, self._empty, replace(self.counts, usable=len(records) - ties, ties=ties), self._memory
        )


def split_holdout(
    encoded: EncodedSet, share: float, maximum: int, seed: int
) -> tuple[EncodedSet, EncodedSet]:
    """(train, held out): at most ``share`` of the groups and ``maximum`` of them, no prompt in both, never
    all.

    Prompts are taken in an order drawn by ``seed`` and their text, each with all its groups if they still
    fit; so a prompt's place does not depend on the other prompts' order in the file.
    """
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(encoded):
        groups.setdefault(record.prompt, []).append(index)
    room = min(int(share * len(encoded)), maximum)
    held: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: derive(seed, "holdout", prompt)):
        if len(held) + len(groups[prompt]) <= room:
            held.update(groups[prompt])
    train = [index for index in range(len(encoded)) if index not in held]
    return encoded.subset(train), encoded.subset(sorted(held))


def write_manifest(path: Path, encoded: EncodedSet) -> None:
    """Write the list of an encoded set, atomically."""
    header = {"version": VERSION, "empty": encoded._empty, "counts": asdict(encoded.counts)}
    rows = [header, *(asdict(record) for record in encoded)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_manifest(path: Path, memory: Memory) -> EncodedSet | None:
    """The encoded set that a manifest lists, or None if there is none, it is damaged, or a tensor file is
    absent.

    Tensor files that fit in memory are read and checked; of larger sets only the presence is (reading finds
    the rest).
    """
    try:
        header, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if header["version"] != VERSION:
            return None
        records = [record_from(row) for row in rows]
        counts = Counts(**{**header["counts"], "skipped": tuple(header["counts"]["skipped"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if counts.usable + counts.ties != len(records):
        return None
    keys = {("text", header["empty"])} | {key for record in records for key in record.keys}
    return EncodedSet(records, header["empty"], counts, memory) if all_there(memory.store, keys) else None


def all_there(store: Store, keys: set[tuple[str, str]], thorough_below: int = 2 * 2**30) -> bool:
    """Whether every file is there; and sound, where they are together at most ``thorough_below`` bytes."""
    sizes = [store.size(*key) for key in keys]
    if not all(sizes):
        return False
    return sum(sizes) > thorough_below or all(store.read(*key) is not None for key in keys)


def record_from(row: dict[str, Any]) -> Record:
    """A Record of its json; KeyError or TypeError if it is none."""
    pairs = ("original", "resized", "corner", "target")
    images = [
        EncodedImage(
            image["key"], image["flipped"], Cut(**{name: tuple(image["cut"][name]) for name in pairs})
        )
        for image in row["images"]
    ]
    return Record(row["prompt"], row["text"], tuple(images), tuple(row["scores"]), row["where"])
