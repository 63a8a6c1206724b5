"""Encode a preference set once, so that the frozen encoders are not needed in training.

Each image's (or video's) VAE posterior is kept as mean and standard deviation, not as a sample, so that
training can draw anew at each visit; each prompt's embedding is kept, and that of the empty prompt. Files are
keyed by content, model and settings: existing ones are not computed again, a stopped run continues, and sets
that share images share files. They hold float32, or float16 where ``half`` says that the model runs in half
precision anyway.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from diffalign.config.schema import DataConfig
from diffalign.data.batches.views import viewed
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.encoded import EncodedSet, Shared, read_manifest, write_manifest
from diffalign.data.encoding.filters import filtered
from diffalign.data.encoding.prepare import Prepared, UnreadableError, prepare, rate
from diffalign.data.encoding.rating import Rater, same_number
from diffalign.data.encoding.records import ROWS, SCHEMA, Record, row_of
from diffalign.data.encoding.store import Memory, Store, is_full, no_space
from diffalign.data.encoding.writer import VERSION, Encoders, Writer
from diffalign.data.reading.examples import Preferences, Skipped, count, digest
from diffalign.errors import UserError

MEMORY = 512 * 2**20  # bytes of tensors cached in memory, all data-loader processes together
THREADS = 2  # threads that read and decode in advance if data.workers is 0

_PART = pa.schema([pa.field("index", pa.int64()), pa.field("skipped", pa.large_string()), *SCHEMA])

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
    """Encode missing tensors, and return the whole set in the configured view, with final counts.

    ``rater`` scores each image beside its label, or instead of it (``config.rewards_as``).
    With several processes each encodes the rows ``rank, rank + world, ...`` and ``barrier`` waits for all of
    them (twice); every process returns the same set. Raises UserError if nothing in the set is usable,
    if an encoder gives NaN, and if the disk is full; unreadable images are skipped, counted and named in
    ``counts.skipped``.
    """
    store = Store(cache_dir)
    memory = Memory(store, MEMORY // max(1, config.workers))
    manifest = f"manifests/{set_name(model, preferences, config, half, rater)}.arrow"
    known = read_manifest(store.files, manifest, memory) if preferences.fingerprint else None
    barrier()  # the store is repaired after all processes have read it
    if known is not None:
        return _useful(filtered(viewed(known, config), config.filters), preferences.name)

    store.salvage()
    # kept: two runs on one cache have equal parts, and none removes the other's
    parts = [f"manifests/parts/{Path(manifest).stem}.{r}-of-{world}.arrow" for r in range(world)]
    writer = Writer(model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
    with completed(store, writer):
        shared = Shared(writer.text(""), writer.negative())
        deque(encode_share(preferences, config, writer, parts, rank=rank, progress=progress, rater=rater), 0)
        store.seal()
        barrier()
        if store.converted:
            tqdm.write(
                f"{store.converted} tensors of {store.files} moved from one file each to shards; the folders "
                "latents, text and patches of earlier versions can be removed",
                file=sys.stderr,
            )
        store.refresh()
        encoded = merge(store, manifest, parts, shared, memory, rank)
        same_number(encoded.records)
        all_or_none(encoded.records)
    return _useful(filtered(viewed(encoded, config), config.filters), preferences.name)


def all_or_none(records: Columns) -> None:
    """Check that every group has a source image, or none has: a batch is told of it or not.

    Raises:
        UserError: some have and some have not.
    """
    there = records.has_source
    if there.any() and not there.all():
        first, other = (records[int(np.argmax(there == has))].where for has in (True, False))
        raise UserError(
            f"{first} has a source image and {other} has none; allowed: a set whose rows all have one, or "
            "none"
        )


@contextmanager
def completed(store: Store, writer: Writer) -> Iterator[None]:
    """Enter an encoding whose shards are completed where it is interrupted.

    Raises:
        UserError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        store.abandon()
        raise no_space(store.folder, writer.bytes_needed) from error
    except BaseException as error:
        _keep(store, error)
        raise


def _keep(store: Store, error: BaseException) -> None:
    """Complete the shards of an interrupted encoding; an error here must not hide the first one."""
    try:
        store.seal()
    except OSError as other:
        error.add_note(f"what was being written to {store.files} could not be completed: {other}")
        store.abandon()


def _useful(encoded: EncodedSet, name: str) -> EncodedSet:
    if not encoded.counts.usable:
        first = f"; {encoded.counts.skipped[0]}" if encoded.counts.skipped else ""
        raise UserError(f"{name}: nothing to learn from: {encoded.counts.text}{first}")
    return encoded


def set_name(
    model: Encoders, preferences: Preferences, config: DataConfig, half: bool, rater: Rater | None
) -> str:
    """Return the name of a set's manifest: a digest of model, rows and settings."""
    source = [preferences.fingerprint, preferences.name, config.split, config.limit]
    space = [config.resolution, config.height, config.width, config.crop, config.flip]
    geometry = [*space, config.buckets, config.bucket_step, config.frames, config.fps]
    labels = [config.segment_seconds, config.label]
    rewards = [rater.fingerprint if rater else "", config.rewards_as]
    hashes = ["hashes"] if config.filters.near is not None else []
    hashes += ["whole"] if config.unreadable == "refuse" else []  # a set with rows left out is another one
    parts = [VERSION, model.fingerprint, half, source, geometry, labels, rewards, *hashes]
    return digest(json.dumps(parts).encode())


def encode_share(
    preferences: Preferences,
    config: DataConfig,
    writer: Writer,
    parts: list[str],
    *,
    rank: int,
    progress: bool,
    rater: Rater | None,
) -> Iterator[Record | Skipped]:
    """Encode this rank's rows, every len(parts)-th, write a row for each into its part, and yield the record;
    its tensors may still be buffered in ``writer`` and its store. The part is complete at the end.
    """
    rows = islice(enumerate(preferences.unfinished()), rank, None, len(parts))
    total = None if preferences.total is None else len(range(rank, preferences.total, len(parts)))
    ready = lambda row: (  # noqa: E731
        row[0], prepare(preferences.finish(row[1]), config, writer, rater is not None),
    )  # fmt: skip
    files = writer.store.files
    temporary = files.temporary("manifests/parts", ".tmp")
    try:
        with (
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, _PART) as part,
            tqdm(total=total, desc="encoding", unit="group", disable=not progress or rank > 0) as bar,
        ):
            waiting: list[dict[str, Any]] = []
            for index, prepared in rate(_ahead(ready, rows, config.workers or THREADS), rater, config):
                writer.rows_left = None if total is None else total - int(bar.n)
                written = prepared if isinstance(prepared, Skipped) else _write(prepared, writer)
                _refuse_unreadable(written, config)
                waiting.append({"index": index, **_row(written)})
                yield written
                if len(waiting) >= ROWS:
                    part.write_batch(pa.RecordBatch.from_pylist(waiting, _PART))
                    waiting = []
                bar.update()
            writer.flush()
            part.write_batch(pa.RecordBatch.from_pylist(waiting, _PART))
        files.put(temporary, parts[rank])
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_unreadable(written: Record | Skipped, config: DataConfig) -> None:
    """UserError where a row cannot be read and the set's settings do not allow that."""
    if config.unreadable == "refuse" and isinstance(written, Skipped) and written.cause == "unreadable":
        raise UserError(
            f"{written.where}: {written.reason}; data.unreadable is refuse, allowed: skip, which leaves it "
            "out"
        )


def _row(written: Record | Skipped) -> dict[str, Any]:
    if not isinstance(written, Skipped):
        return row_of(written)
    if written.cause == "unreadable":
        tqdm.write(f"skipped {written.where}: {written.reason}", file=sys.stderr)
    return {"skipped": json.dumps(asdict(written))}


def _write(prepared: Prepared, writer: Writer) -> Record | Skipped:
    """Encode the missing tensors of a group; a video may still turn out to be damaged."""
    try:
        writer.images(prepared.pixels)
    except UnreadableError as error:
        return Skipped(str(error), prepared.record.where)
    source = prepared.record.source
    for key, pixels in prepared.source.items():
        writer.source(key, pixels, max(1, source.cut.frames if source else 1))
    prompts, read = (prepared.example.prompt, *prepared.example.prompts), None
    if source is not None and prepared.record.empty is not None:
        prompts, read = (*prompts, ""), (source.key, prepared.source[source.key])
    for prompt in prompts:
        writer.text(prompt, read)
    writer.maps(prepared.maps)
    return prepared.record


def merge(
    store: Store, manifest: str, parts: list[str], shared: Shared, memory: Memory, rank: int
) -> EncodedSet:
    """Return the set of all parts in the order of its rows; rank 0 writes the manifest."""
    tables = [pa.ipc.open_file(pa.memory_map(str(store.files.fresh(part)))).read_all() for part in parts]
    table = pa.concat_tables(tables)
    order = np.argsort(table["index"].to_numpy(), kind="stable") if len(table) else np.zeros(0, np.int64)
    if len(parts) > 1:
        table = table.take(pa.array(order))
    rows = table["skipped"].drop_null().to_pylist()
    skipped = [Skipped(**json.loads(row)) for row in rows]
    groups = table.select(SCHEMA.names)
    if rows:
        groups = groups.filter(table["skipped"].is_null())
    columns = Columns(groups.cast(SCHEMA))
    encoded = EncodedSet(columns, shared, count(skipped), memory).recounted()
    if rank == 0:
        temporary = store.files.temporary("manifests", ".tmp")
        write_manifest(temporary, columns.table.to_batches(max_chunksize=ROWS), shared, encoded.counts)
        store.files.put(temporary, manifest)
    return encoded


def _ahead(function: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """Return ``map`` in order, computed in advance by ``workers`` threads; with 0, in the caller's thread."""
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
