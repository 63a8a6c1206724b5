"""Encode a preference set once: the frozen encoders leave the training loop.

Each image's (or video's) VAE posterior is kept as mean and standard deviation, not as a sample, so that
training can draw anew at each visit; each prompt's embedding is kept, and that of the empty prompt. Files are
keyed by content, model and settings: what is there is not computed again, a run that was stopped goes on
where it was, and sets that share images share files. They hold float32, or float16 where ``half`` says that
the model runs in half precision anyway.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from diffalign.config.schema import DataConfig
from diffalign.data.batches.views import viewed
from diffalign.data.encoding.encoded import (
    EncodedSet,
    Record,
    Shared,
    read_manifest,
    record_from,
    write_manifest,
)
from diffalign.data.encoding.prepare import Prepared, UnreadableError, prepare, rate
from diffalign.data.encoding.rating import Rater, same_number
from diffalign.data.encoding.store import Memory, Store, is_full, no_space
from diffalign.data.encoding.writer import VERSION, Encoders, Writer
from diffalign.data.reading.examples import Preferences, Skipped, count, digest
from diffalign.errors import UserError
from diffalign.utils.files import open_atomic

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
    rater: Rater | None = None,
) -> EncodedSet:
    """Encode what is not encoded yet and return the whole set in the view asked for, its counts final.

    ``rater`` scores each image beside its label, or instead of it (``config.rewards_as``).
    With several processes each encodes the rows ``rank, rank + world, ...`` and ``barrier`` waits for all of
    them (twice); every process returns the same set. Raises UserError if nothing in the set is usable,
    if an encoder gives NaN, and if the disk is full; unreadable images are skipped, counted and named in
    ``counts.skipped``.
    """
    store = Store(cache_dir)
    memory = Memory(store, MEMORY // max(1, config.workers))
    manifest = store.folder / "manifests" / f"{_set_name(model, preferences, config, half, rater)}.jsonl"
    known = read_manifest(manifest, memory) if preferences.fingerprint else None
    barrier()  # nobody repairs a file before everybody has looked
    if known is not None:
        return _useful(viewed(known, config), preferences.name)

    # kept, so that two runs on one cache never take a part from each other: theirs are the same
    parts = [manifest.parent / "parts" / f"{manifest.stem}.{r}-of-{world}.jsonl" for r in range(world)]
    writer = Writer(model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
    try:
        shared = Shared(writer.text(""), writer.negative())
        _encode_share(preferences, config, writer, parts, rank, progress, rater)
        barrier()
        encoded = _merge(parts, shared, memory)
        same_number([(record.where, record.rewards) for record in encoded])
        seen = _useful(viewed(encoded, config), preferences.name)
        if rank == 0:
            write_manifest(manifest, encoded)
    except OSError as error:
        if not is_full(error):
            raise
        raise no_space(store.folder, writer.bytes_needed) from error
    return seen


def _useful(encoded: EncodedSet, name: str) -> EncodedSet:
    if not encoded.counts.usable:
        first = f"; {encoded.counts.skipped[0]}" if encoded.counts.skipped else ""
        raise UserError(f"{name}: nothing to learn from: {encoded.counts.text}{first}")
    return encoded


def _set_name(
    model: Encoders, preferences: Preferences, config: DataConfig, half: bool, rater: Rater | None
) -> str:
    source = [preferences.fingerprint, preferences.name, config.split, config.limit]
    space = [config.resolution, config.height, config.width, config.crop, config.flip]
    geometry = [*space, config.buckets, config.bucket_step, config.frames, config.fps]
    labels = [config.segment_seconds, config.label]
    rewards = [rater.fingerprint if rater else "", config.rewards_as]
    return digest(json.dumps([VERSION, model.fingerprint, half, source, geometry, labels, rewards]).encode())


def _encode_share(
    preferences: Preferences,
    config: DataConfig,
    writer: Writer,
    parts: list[Path],
    rank: int,
    progress: bool,
    rater: Rater | None,
) -> None:
    """Encode this rank's rows, every len(parts)-th, and write one json object a row into its part."""
    rows = islice(enumerate(preferences.unfinished()), rank, None, len(parts))
    total = None if preferences.total is None else len(range(rank, preferences.total, len(parts)))
    ready = lambda row: (  # noqa: E731
        row[0], prepare(preferences.finish(row[1]), config, writer, rater is not None),
    )  # fmt: skip
    with (
        open_atomic(parts[rank]) as part,
        tqdm(total=total, desc="encoding", unit="group", disable=not progress or rank > 0) as bar,
    ):
        for index, prepared in rate(_ahead(ready, rows, config.workers), rater, config):
            writer.rows_left = None if total is None else total - int(bar.n)
            written = prepared if isinstance(prepared, Skipped) else _write(prepared, writer)
            if isinstance(written, Skipped):
                if written.cause == "unreadable":
                    tqdm.write(f"skipped {written.where}: {written.reason}", file=sys.stderr)
                row: dict[str, Any] = {"index": index, "skipped": asdict(written)}
            else:
                row = {"index": index, **asdict(written)}
            part.write(f"{json.dumps(row)}\n".encode())
            bar.update()
        writer.flush()


def _write(prepared: Prepared, writer: Writer) -> Record | Skipped:
    """Have what is missing of a group encoded; it may still turn out that a video is damaged."""
    try:
        writer.images(prepared.pixels)
    except UnreadableError as error:
        return Skipped(str(error), prepared.record.where)
    for prompt in (prepared.example.prompt, *prepared.example.prompts):
        writer.text(prompt)
    writer.maps(prepared.maps)
    return prepared.record


def _merge(parts: list[Path], shared: Shared, memory: Memory) -> EncodedSet:
    rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["index"])
    skipped = [Skipped(**row["skipped"]) for row in rows if "skipped" in row]
    records = [record_from(row) for row in rows if "skipped" not in row]
    return EncodedSet(records, shared, count(skipped), memory).subset(range(len(records)))


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
