"""Encode a preference set once: the frozen encoders leave the training loop.

Each image's VAE posterior is kept as mean and standard deviation, not as a sample, so that training can draw
anew at each visit; each prompt's embedding is kept, and that of the empty prompt. Files are keyed by content,
model and settings: what is there is not computed again, a run that was stopped goes on where it was, and sets
that share images share files. They hold float32, or float16 where ``half`` says that the model runs in half
precision anyway.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.config import DataConfig
from diffalign.data.encoded import (
    EncodedImage,
    EncodedSet,
    Record,
    Shared,
    read_manifest,
    record_from,
    write_manifest,
)
from diffalign.data.examples import Example, Preferences, Skipped, count, digest
from diffalign.data.geometry import Size, cuts
from diffalign.data.images import UNREADABLE, cut_out, decode, image_size, why_unreadable
from diffalign.data.store import Memory, Store, is_full, no_space
from diffalign.data.writer import VERSION, Encoders, Writer
from diffalign.errors import UserError
from diffalign.files import open_atomic

MEMORY = 2 * 2**30  # bytes of tensors kept in memory, all data-loader processes together

A = TypeVar("A")
B = TypeVar("B")


def encode_preferences(
    model: Encoders,
    preferences: Preferences,
    config: DataConfig,
    cache_dir: Path | str,
    progress: bool = True,
    *,
    half: bool = False,
    rank: int = 0,
    world: int = 1,
    barrier: Callable[[], None] = lambda: None,
) -> EncodedSet:
    """Encode what is not encoded yet and return the whole set, its counts final.

    With several processes each encodes the rows ``rank, rank + world, ...`` and ``barrier`` waits for all of
    them (twice); every process returns the same set. Raises UserError if nothing in the set is usable,
    if an encoder gives NaN, and if the disk is full; unreadable images are skipped, counted and named in
    ``counts.skipped``.
    """
    store = Store(cache_dir)
    memory = Memory(store, MEMORY // max(1, config.workers))
    manifest = store.folder / "manifests" / f"{_set_name(model, preferences, config, half)}.jsonl"
    known = read_manifest(manifest, memory) if preferences.fingerprint else None
    barrier()  # nobody repairs a file before everybody has looked
    if known is not None:
        return known

    # kept, so that two runs on one cache never take a part from each other: theirs are the same
    parts = [manifest.parent / "parts" / f"{manifest.stem}.{r}-of-{world}.jsonl" for r in range(world)]
    writer = Writer(model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
    try:
        shared = Shared(writer.text(""), writer.negative())
        _encode_share(preferences, config, writer, parts, rank, progress)
        barrier()
        encoded = _merge(parts, shared, memory)
        if not encoded.counts.usable:
            first = f"; {encoded.counts.skipped[0]}" if encoded.counts.skipped else ""
            raise UserError(f"{preferences.name}: nothing to learn from: {encoded.counts.text}{first}")
        if rank == 0:
            write_manifest(manifest, encoded)
    except OSError as error:
        if not is_full(error):
            raise
        raise no_space(store.folder, writer.bytes_needed) from error
    return encoded


def _set_name(model: Encoders, preferences: Preferences, config: DataConfig, half: bool) -> str:
    source = [preferences.fingerprint, preferences.name, config.split, config.limit]
    geometry = [config.resolution, config.crop, config.flip, config.buckets, config.bucket_step]
    return digest(json.dumps([VERSION, model.fingerprint, half, source, geometry]).encode())


def _encode_share(
    preferences: Preferences,
    config: DataConfig,
    writer: Writer,
    parts: list[Path],
    rank: int,
    progress: bool,
) -> None:
    """Encode this rank's rows, every len(parts)-th, and write one json object a row into its part."""
    rows = islice(enumerate(preferences.rows()), rank, None, len(parts))
    total = None if preferences.total is None else len(range(rank, preferences.total, len(parts)))
    prepare = lambda row: (row[0], _prepare(row[1], config, writer))  # noqa: E731
    with (
        open_atomic(parts[rank]) as part,
        tqdm(total=total, desc="encoding", unit="group", disable=not progress or rank > 0) as bar,
    ):
        for index, prepared in _ahead(prepare, rows, config.workers):
            if isinstance(prepared, Skipped):
                if prepared.cause == "unreadable":
                    tqdm.write(f"skipped {prepared.where}: {prepared.reason}", file=sys.stderr)
                row: dict[str, Any] = {"index": index, "skipped": asdict(prepared)}
            else:
                writer.rows_left = None if total is None else total - int(bar.n)
                for prompt in prepared.prompts:
                    writer.text(prompt)
                writer.images(prepared.missing)
                row = {"index": index, **asdict(prepared.record)}
            part.write(f"{json.dumps(row)}\n".encode())
            bar.update()
        writer.flush()


def _merge(parts: list[Path], shared: Shared, memory: Memory) -> EncodedSet:
    rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["index"])
    skipped = [Skipped(**row["skipped"]) for row in rows if "skipped" in row]
    records = [record_from(row) for row in rows if "skipped" not in row]
    return EncodedSet(records, shared, count(skipped), memory).subset(range(len(records)))


@dataclass(frozen=True)
class _Prepared:
    record: Record
    prompts: tuple[str, ...]
    missing: list[tuple[str, Tensor]]  # (key, uint8 pixels) of what is not in the store


def _prepare(example: Example | Skipped, config: DataConfig, writer: Writer) -> _Prepared | Skipped:
    """Find an example's keys, and the pixels of what is to be encoded. Runs in threads: PIL frees the GIL."""
    if isinstance(example, Skipped):
        return example
    contents: list[bytes] = []
    sizes: list[Size] = []
    images: list[EncodedImage] = []
    missing: list[tuple[str, Tensor]] = []
    at = 0  # the image to name if it cannot be read
    try:
        for at, image in enumerate(example.images):  # noqa: B007
            contents.append(image.read())
            sizes.append(image_size(contents[-1]))
        names = [digest(content) for content in contents]
        group = cuts(sizes, config, "".join(names))
        for at, (content, name, cut) in enumerate(zip(contents, names, group, strict=True)):  # noqa: B007
            key = writer.latent_key(name, cut, flipped=False)
            flipped = writer.latent_key(name, cut, flipped=True) if config.flip else None
            images.append(EncodedImage(key, flipped, cut, name))
            if not (writer.has(key) and (flipped is None or writer.has(flipped))):
                pixels = cut_out(decode(content), cut)
                missing.append((key, pixels))
                if flipped:
                    missing.append((flipped, pixels.flip(-1)))
    except UNREADABLE as error:
        source = example.images[at].source
        name = source.name if isinstance(source, Path) else f"image {at}"
        return Skipped(f"{name} is unreadable ({why_unreadable(error)})", example.where)
    text, *own = (writer.text_key(prompt) for prompt in (example.prompt, *example.prompts))
    record = Record(example.prompt, text, tuple(images), example.scores, example.where, tuple(own))
    return _Prepared(record, (example.prompt, *example.prompts), missing)


def _ahead(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """``map`` in order, computed ahead by ``workers`` threads; by none, in the caller's."""
    if not workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[B]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
