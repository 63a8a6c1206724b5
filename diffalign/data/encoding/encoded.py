"""An encoded preference set: what training reads instead of images and prompts.

The manifest is json lines: a header with a version, the keys that all groups share and the counts, then one
line a group. It is a list of keys into the store; the tensors themselves lie there.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from diffalign.data.encoding.geometry import Cut, Size
from diffalign.data.encoding.store import Memory, Store, Tensors
from diffalign.data.reading.dense import Dense, dense_from
from diffalign.data.reading.examples import Counts, Kind, is_tie, kind_of
from diffalign.diffusion.randomness import derive
from diffalign.utils.files import write_atomic

VERSION = 4

Bucket = tuple[int, int, int]
"""(height, width) in pixels and frames, 0 of images: groups of one bucket fit into one batch."""


@dataclass(frozen=True)
class EncodedImage:
    """An image or video of a group: the keys of its posterior's moments, and how it was cut."""

    key: str
    flipped: str | None  # key of the mirrored image's moments, if flips were asked for
    cut: Cut
    content: str  # digest of the image file: the same picture, however it was cut


@dataclass(frozen=True)
class Shared:
    """Keys of what every group may need: the embedded empty prompt, and what guidance guides away from."""

    empty: str
    negative: str


@dataclass(frozen=True)
class Record:
    """A group: an Example whose images and prompt are encoded (K images, K scores)."""

    prompt: str
    text: str  # key of the prompt's embedding
    images: tuple[EncodedImage, ...]
    scores: tuple[float, ...]
    where: str
    texts: tuple[str, ...] = ()  # key of each image's own prompt, where they differ
    rewards: tuple[tuple[float, ...], ...] = ()  # R second opinions an image
    patches: tuple[str | None, ...] = ()  # key of each image's weight map, None for weight 1
    weight: float = 1.0
    dense: Dense | None = None  # labels in time

    @property
    def kind(self) -> Kind:
        """What the group counts as."""
        segments = self.dense.scores if self.dense else ()
        return kind_of(self.scores, len(self.images), bool(self.texts), segments)

    @property
    def target(self) -> Size:
        """(height, width) in pixels, common to the group."""
        return self.images[0].cut.target

    @property
    def bucket(self) -> Bucket:
        """What groups of one batch have in common."""
        return (*self.target, self.images[0].cut.frames)

    @property
    def is_tie(self) -> bool:
        """Whether no image is better than another, at any time."""
        return is_tie(self.scores, self.dense.scores if self.dense else ())

    @property
    def keys(self) -> list[tuple[str, str]]:
        """(kind, key) of every file that the group needs."""
        images = [key for image in self.images for key in (image.key, image.flipped) if key]
        texts = [("text", key) for key in (self.text, *self.texts)]
        maps = [("patches", key) for key in self.patches if key]
        return [*texts, *(("latents", key) for key in images), *maps]


class EncodedSet(Sequence[Record]):
    """Records in the order of the rows, and their tensors, read when asked for and kept in memory while they
    fit.

    Attributes:
        records: the groups.
        shared: keys of what every group may need.
        counts: usable groups and ties among ``records``; rows dropped in the whole set.
        dense: whether labels are dense, those of the whole set alike: a global one counts for all frames.
    """

    def __init__(
        self,
        records: Iterable[Record],
        shared: Shared,
        counts: Counts,
        memory: Memory,
        also: Callable[[str], Tensors] | None = None,
        dense: bool | None = None,
    ):
        """``also`` gives further tensors of a prompt, which then are in its ``text``; ``dense`` is whether
        labels are, None: if those of a record are.
        """
        self.records = tuple(records)
        self.dense = any(record.dense for record in self.records) if dense is None else dense
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
        """A record, or a tuple of them."""
        return self.records[index]

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
        """The embedding of an image's prompt by name, each without a batch axis, float32."""
        text = self._memory.get("text", record.texts[image] if record.texts else record.text)
        return text if self._also is None else {**text, **self._also(record.prompt)}

    def empty_text(self) -> Tensors:
        """The embedding of the empty prompt, as ``text``."""
        return self._memory.get("text", self.shared.empty)

    def negative_text(self) -> Tensors:
        """The embedding that guidance guides away from, as ``text``."""
        return self._memory.get("text", self.shared.negative)

    def weights(self, record: Record, image: int, flipped: bool = False) -> Tensor:
        """The weight map of an image, (1, H, W) of its latents' size: ones where it has none."""
        key = record.patches[image] if record.patches else None
        if key is None:
            return torch.ones_like(self.moments(record.images[image])[0][:1])
        weights = self._memory.get("patches", key)["weights"]
        return weights.flip(-1) if flipped else weights

    @cached_property
    def extras(self) -> frozenset[str]:
        """What the batches of this set have beside labels: of ``reward``, ``patches``, ``weight``.

        It is the set that has them or not, so that every batch on every rank holds the same names.
        """
        there = {
            "reward": bool(self.records) and all(record.rewards for record in self.records),
            "patches": any(key for record in self.records for key in record.patches),
            "weight": any(record.weight != 1 for record in self.records),
        }
        return frozenset(name for name, holds in there.items() if holds)

    def scores(self, record: Record, image: int) -> list[float]:
        """The score of an image, or of each latent frame of a video where labels are dense."""
        if not self.dense:
            return [record.scores[image]]
        if record.dense:
            return record.dense.per_frame(image)
        return [record.scores[image]] * self.moments(record.images[image])[0].shape[1]

    def subset(self, indices: Iterable[int]) -> "EncodedSet":
        """The set of these records, sharing tensors with this one."""
        return self.holding((self.records[index] for index in indices), self.dense)

    def holding(self, records: Iterable[Record], dense: bool | None = None) -> "EncodedSet":
        """A set of other records over the same tensors."""
        records = tuple(records)
        counts = self.counts.of((record.kind for record in records), (r.dense for r in records if r.dense))
        return EncodedSet(records, self.shared, counts, self._memory, self._also, dense)

    def saying(self, also: Callable[[str], Tensors]) -> "EncodedSet":
        """The set with further tensors in every ``text``, made of the prompt by ``also``."""
        return EncodedSet(self.records, self.shared, self.counts, self._memory, also, self.dense)


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
    header = {"version": VERSION, "shared": asdict(encoded.shared), "counts": asdict(encoded.counts)}
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
        shared = Shared(**header["shared"])
        counts = Counts(**{**header["counts"], "skipped": tuple(header["counts"]["skipped"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if counts.usable + counts.ties != len(records):
        return None
    keys = {("text", shared.empty), ("text", shared.negative)}
    keys |= {key for record in records for key in record.keys}
    return EncodedSet(records, shared, counts, memory) if all_there(memory.store, keys) else None


def all_there(store: Store, keys: set[tuple[str, str]], thorough_below: int = 2 * 2**30) -> bool:
    """Whether every file is there; and sound, where they are together at most ``thorough_below`` bytes."""
    sizes = [store.size(*key) for key in keys]
    if not all(sizes):
        return False
    return sum(sizes) > thorough_below or all(store.read(*key) is not None for key in keys)


def record_from(row: dict[str, Any]) -> Record:
    """A Record of its json; KeyError or TypeError if it is none."""
    pairs = ("original", "resized", "corner", "target")
    cut = lambda row: Cut(**{**row, **{name: tuple(row[name]) for name in pairs}})  # noqa: E731
    images = [EncodedImage(**{**image, "cut": cut(image["cut"])}) for image in row["images"]]
    return Record(
        prompt=row["prompt"],
        text=row["text"],
        images=tuple(images),
        scores=tuple(row["scores"]),
        where=row["where"],
        texts=tuple(row["texts"]),
        rewards=tuple(map(tuple, row["rewards"])),
        patches=tuple(row["patches"]),
        weight=row["weight"],
        dense=dense_from(row["dense"]),
    )
