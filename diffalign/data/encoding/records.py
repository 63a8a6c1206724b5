"""A record of an encoded set, and how it is written as a row of an Arrow table."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa

from diffalign.data.encoding.geometry import Cut, Size
from diffalign.data.reading.dense import Dense, dense_from
from diffalign.data.reading.examples import Kind, is_tie, kind_of

Bucket = tuple[int, int, int]
"""(height, width) in pixels and frames, 0 of images: groups of one bucket fit into one batch."""

ROWS = 2**14  # of a record batch

_KEY = pa.binary(16)
_SIZE = pa.list_(pa.int32())
_IMAGE = pa.struct(
    {
        "key": _KEY,
        "flipped": _KEY,
        "original": _SIZE,
        "resized": _SIZE,
        "corner": _SIZE,
        "target": _SIZE,
        "frames": pa.int32(),
        "fps": pa.float64(),
        "content": _KEY,
    }
)
SCHEMA = pa.schema(
    {
        "prompt": pa.large_string(),
        "text": _KEY,
        "images": pa.list_(_IMAGE),
        "scores": pa.list_(pa.float64()),
        "where": pa.large_string(),
        "texts": pa.list_(_KEY),
        "rewards": pa.list_(pa.list_(pa.float64())),
        "patches": pa.list_(_KEY),
        "weight": pa.float64(),
        "dense": pa.large_string(),
        "votes": pa.list_(pa.float64()),
        "hashes": pa.list_(pa.uint64()),
        "source": _IMAGE,
        "empty": _KEY,
        "time_labels": pa.list_(pa.int8()),
        "animated": pa.list_(pa.large_string()),
    }
)


@dataclass(frozen=True)
class EncodedImage:
    """An image or video of a group: the keys of its posterior's moments, and how it was cut."""

    key: str
    flipped: str | None  # key of the mirrored image's moments, if flips were encoded
    cut: Cut
    content: str  # digest of the image file, independent of the crop


@dataclass(frozen=True)
class Record:
    """A group: an Example whose images and prompt are encoded (K images, K scores)."""

    prompt: str
    text: str  # key of the prompt's embedding
    images: tuple[EncodedImage, ...]
    scores: tuple[float, ...]
    where: str
    texts: tuple[str, ...] = ()  # key of each image's own prompt, where they differ
    rewards: tuple[tuple[float, ...], ...] = ()  # R rewards an image
    patches: tuple[str | None, ...] = ()  # key of each image's weight map, None for weight 1
    weight: float = 1.0
    dense: Dense | None = None  # labels in time
    votes: tuple[float, ...] = ()  # share of the voters who preferred each image
    hashes: tuple[
        int, ...
    ] = ()  # perceptual hash of each image (``hashing.dhash``), where near ones are sought
    source: EncodedImage | None = None  # what the images were made from; its key is of its conditions
    empty: str | None = None  # key of the empty prompt read together with the source; None: the set's own
    time_labels: tuple[int, ...] = ()  # 1, -1 or 0 for each of equal intervals of time
    animated: tuple[str, ...] = ()  # image files with several frames or pages, of which the first is encoded

    @property
    def kind(self) -> Kind:
        """Kind of the group in counts."""
        segments = self.dense.scores if self.dense else ()
        return kind_of(self.scores, len(self.images), bool(self.texts), segments)

    @property
    def target(self) -> Size:
        """(height, width) in pixels, common to the group."""
        return self.images[0].cut.target

    @property
    def bucket(self) -> Bucket:
        """(height, width, frames), equal for the groups of a batch."""
        return (*self.target, self.images[0].cut.frames)

    @property
    def is_tie(self) -> bool:
        """Whether no image is better than another, at any time."""
        return is_tie(self.scores, self.dense.scores if self.dense else ())


def row_of(record: Record) -> dict[str, Any]:
    """Return the cells of a record, of ``SCHEMA``."""

    def raw(key: str | None) -> bytes | None:
        return None if key is None else bytes.fromhex(key)

    def cells(image: EncodedImage) -> dict[str, Any]:
        keys = {name: raw(getattr(image, name)) for name in ("key", "flipped", "content")}
        return {**asdict(image.cut), **keys}

    return {
        "prompt": record.prompt,
        "text": raw(record.text),
        "images": list(map(cells, record.images)),
        "scores": record.scores,
        "where": record.where,
        "texts": list(map(raw, record.texts)),
        "rewards": record.rewards,
        "patches": list(map(raw, record.patches)),
        "weight": record.weight,
        "dense": None if record.dense is None else json.dumps(asdict(record.dense)),
        "votes": record.votes,
        "hashes": record.hashes,
        "source": None if record.source is None else cells(record.source),
        "empty": raw(record.empty),
        "time_labels": record.time_labels,
        "animated": record.animated,
    }


def record_from(row: Mapping[str, Any]) -> Record:
    """Return the record of some cells; KeyError, TypeError or ValueError if they are none."""

    def name(raw: bytes | None) -> str | None:
        return None if raw is None else raw.hex()

    def encoded(image: Mapping[str, Any]) -> EncodedImage:
        parts = ("original", "resized", "corner", "target")
        original, resized, corner, target = (tuple(image[part]) for part in parts)
        cut = Cut(original, resized, corner, target, image["frames"], image["fps"])
        return EncodedImage(image["key"].hex(), name(image["flipped"]), cut, image["content"].hex())

    return Record(
        prompt=row["prompt"],
        text=row["text"].hex(),
        images=tuple(map(encoded, row["images"])),
        scores=tuple(row["scores"]),
        where=row["where"],
        texts=tuple(raw.hex() for raw in row["texts"]),
        rewards=tuple(map(tuple, row["rewards"])),
        patches=tuple(map(name, row["patches"])),
        weight=row["weight"],
        dense=None if row["dense"] is None else dense_from(json.loads(row["dense"])),
        votes=tuple(row["votes"]),
        hashes=tuple(row["hashes"]),
        source=None if row["source"] is None else encoded(row["source"]),
        empty=name(row["empty"]),
        time_labels=tuple(row["time_labels"]),
        animated=tuple(row["animated"]),
    )


def batches_of(records: Iterable[Record]) -> Iterator[pa.RecordBatch]:
    """Yield record batches of ``SCHEMA``."""
    records = iter(records)
    while rows := [row_of(record) for record in islice(records, ROWS)]:
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)
