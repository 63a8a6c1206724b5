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
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.config import DataConfig
from diffalign.data.encoded import (
    EncodedImage,
    EncodedSet,
    Record,
    read_manifest,
    record_from,
    write_manifest,
)
from diffalign.data.examples import Example, Preferences, Skipped, count, digest
from diffalign.data.geometry import Cut, Size, cuts
from diffalign.data.images import UNREADABLE, cut_out, decode, image_size, to_unit, why_unreadable
from diffalign.data.store import Memory, Store, is_full, no_space
from diffalign.errors import UserError
from diffalign.files import open_atomic

VERSION = 1  # of what is in a file: part of every key
MEMORY = 2 * 2**30  # bytes of tensors kept in memory, all data-loader processes together

A = TypeVar("A")
B = TypeVar("B")


@runtime_checkable
class Encoders(Protocol):
    """What is asked of a loaded model (``diffalign.models.LoadedModel``)."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its frozen encoders would give other numbers: weights, VAE, dtype."""
        ...

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions by name, one row a prompt."""
        ...

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posterior of pixels (B, 3, H, W) in [-1, 1]."""
        ...


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
    writer = _Writer(model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
    try:
        empty = writer.text("")
        _encode_share(preferences, config, writer, parts, rank, progress)
        barrier()
        encoded = _merge(parts, empty, memory)
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
    writer: "_Writer",
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
        tqdm(total=total, desc="encoding", unit="pair", disable=not progress or rank > 0) as bar,
    ):
        for index, prepared in _ahead(prepare, rows, config.workers):
            if isinstance(prepared, Skipped):
                if not prepared.unlabelled:
                    tqdm.write(f"skipped {prepared.where}: {prepared.reason}", file=sys.stderr)
                row: dict[str, Any] = {"index": index, "skipped": asdict(prepared)}
            else:
                writer.rows_left = None if total is None else total - int(bar.n)
                writer.text(prepared.record.prompt)
                writer.images(prepared.missing)
                row = {"index": index, **asdict(prepared.record)}
            part.write(f"{json.dumps(row)}\n".encode())
            bar.update()
        writer.flush()


def _merge(parts: list[Path], empty: str, memory: Memory) -> EncodedSet:
    rows = [json.loads(line) for part in parts for line in part.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["index"])
    skipped = [Skipped(**row["skipped"]) for row in rows if "skipped" in row]
    records = [record_from(row) for row in rows if "skipped" not in row]
    return EncodedSet(records, empty, count(skipped), memory).subset(range(len(records)))


@dataclass(frozen=True)
class _Prepared:
    record: Record
    missing: list[tuple[str, Tensor]]  # (key, uint8 pixels) of what is not in the store


def _prepare(example: Example | Skipped, config: DataConfig, writer: "_Writer") -> _Prepared | Skipped:
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
            images.append(EncodedImage(key, flipped, cut))
            if not (writer.has(key) and (flipped is None or writer.has(flipped))):
                pixels = cut_out(decode(content), cut)
                missing.append((key, pixels))
                if flipped:
                    missing.append((flipped, pixels.flip(-1)))
    except UNREADABLE as error:
        source = example.images[at].source
        name = source.name if isinstance(source, Path) else f"image {at}"
        return Skipped(f"{name} is unreadable ({why_unreadable(error)})", example.where)
    text = writer.text_key(example.prompt)
    return _Prepared(Record(example.prompt, text, tuple(images), example.scores, example.where), missing)


class _Writer:
    """Collects what is missing into batches of equal shape, encodes them and writes the files."""

    def __init__(self, model: Encoders, store: Store, batch_size: int, dtype: torch.dtype):
        self.rows_left: int | None = None  # rows to come, if known: for the message when the disk is full
        self._model = model
        self._store = store
        self._batch_size = batch_size
        self._dtype = dtype
        self._identity = f"{VERSION} {model.fingerprint} {dtype}"
        self._pixels: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._prompts: dict[str, str] = {}
        self._there: set[str] = set()  # keys of latents found sound or written
        self._seen: set[str] = set()  # keys of texts that are there or on the way
        self._files = self._bytes = self._last = 0

    def latent_key(self, content: str, cut: Cut, flipped: bool) -> str:
        geometry = [cut.resized, cut.corner, cut.target, flipped]
        return digest(f"latents {self._identity} {content} {geometry}".encode())

    def text_key(self, prompt: str) -> str:
        return digest(f"text {self._identity} {prompt}".encode())

    def has(self, key: str) -> bool:
        """Whether these latents are in the store, sound."""
        if key not in self._there and self._store.read("latents", key) is not None:
            self._there.add(key)
        return key in self._there

    @property
    def bytes_needed(self) -> int:
        """Of the file that did not fit, or of all that is to come if that can be told (two images a row)."""
        mean = self._bytes / self._files if self._files else self._last
        return int(max(self._last, 2 * mean * (self.rows_left or 0)))

    def text(self, prompt: str) -> str:
        """See to it that a prompt is encoded; its key."""
        key = self.text_key(prompt)
        if key not in self._seen:
            self._seen.add(key)
            if self._store.read("text", key) is None:
                self._prompts[key] = prompt
        if len(self._prompts) >= self._batch_size:
            self._flush_prompts()
        return key

    def images(self, missing: Iterable[tuple[str, Tensor]]) -> None:
        """Encode pixels, as soon as there is a full batch of their shape."""
        for key, pixels in missing:
            if key in self._there:  # written since the pixels were made ready
                continue
            waiting = self._pixels.setdefault(tuple(pixels.shape), {})
            waiting[key] = pixels  # an image that comes twice before its batch is full is encoded once
            if len(waiting) >= self._batch_size:
                self._flush_pixels(self._pixels.pop(tuple(pixels.shape)))

    def flush(self) -> None:
        """Encode what is waiting."""
        self._flush_prompts()
        for waiting in self._pixels.values():
            self._flush_pixels(waiting)
        self._pixels = {}

    def _flush_pixels(self, waiting: dict[str, Tensor]) -> None:
        with torch.no_grad():
            mean, std = self._model.encode_pixels(to_unit(torch.stack(list(waiting.values()))))
        for key, row_mean, row_std in zip(waiting, mean, std, strict=True):
            self._write("latents", key, {"mean": row_mean, "std": row_std})
            self._there.add(key)

    def _flush_prompts(self) -> None:
        if not self._prompts:
            return
        with torch.no_grad():
            embeddings = self._model.encode_prompts(list(self._prompts.values()))
        for row, key in enumerate(self._prompts):
            self._write("text", key, {name: tensor[row] for name, tensor in embeddings.items()})
        self._prompts = {}

    def _write(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        stored = {name: row.detach().to("cpu", self._dtype).contiguous() for name, row in tensors.items()}
        if not all(tensor.isfinite().all() for tensor in stored.values()):
            advice = "set model.dtype to bfloat16 or float32"
            if kind == "latents":
                raise UserError(f"the VAE gives NaN; {advice}, or model.vae to one that bears float16")
            raise UserError(f"the text encoder gives NaN; {advice}")
        self._last = sum(tensor.nbytes for tensor in stored.values())
        self._bytes += self._store.write(kind, key, stored)
        self._files += 1


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
