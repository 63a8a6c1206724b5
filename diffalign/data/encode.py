"""Encode a preference set once: the frozen encoders leave the training loop.

Each image's VAE posterior is kept as mean and standard deviation, not as a sample, so that training can draw anew at each
visit; each prompt's embedding is kept, and that of the empty prompt. Files are keyed by content, model and settings: what is
there is not computed again, a run that was stopped goes on where it was, and sets that share images share files. They hold
float32, or float16 where ``half`` says that the model runs in half precision anyway.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign.config import DataConfig
from diffalign.data.encoded import EncodedImage, EncodedSet, Record, read_manifest, record_from, write_manifest
from diffalign.data.examples import Example, Preferences, Skipped, count, digest
from diffalign.data.geometry import Cut, cuts
from diffalign.data.images import UNREADABLE, cut_out, decode, image_size, to_unit
from diffalign.data.store import Memory, Store, no_space, write_atomic
from diffalign.errors import UserError

VERSION = 1  # of what is in a file: part of every key
MEMORY = 2 * 2**30  # bytes of tensors kept in memory, all data-loader processes together

A = TypeVar("A")
B = TypeVar("B")


class Encoders(Protocol):
    """What is asked of a loaded model (``diffalign.models.LoadedModel``)."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever its frozen encoders would give other numbers: weights, VAE, dtype."""
        ...

    @property
    def family(self) -> Any:
        """Has ``encode_prompts(pipeline, prompts) -> {name: (B, ...)}`` and ``micro_conditions``."""
        ...

    @property
    def pipeline(self) -> Any:
        """Handed to ``family.encode_prompts``."""
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

    With several processes each encodes the rows ``rank, rank + world, ...`` and ``barrier`` waits for all of them (three
    times); every process returns the same set. Raises UserError if nothing in the set is usable, if an encoder gives NaN, and
    if the disk is full; unreadable images are skipped, counted and named in ``counts.skipped``.
    """
    store = Store(cache_dir)
    memory = Memory(store, MEMORY // max(1, config.workers))
    settings = [VERSION, model.fingerprint, half, preferences.fingerprint, preferences.name, config.split, config.limit]
    settings += [config.resolution, config.crop, config.flip, config.buckets, config.bucket_step]
    name = digest(json.dumps(settings).encode())
    manifest = store.folder / "manifests" / f"{name}.jsonl"
    known = read_manifest(manifest, memory) if preferences.fingerprint else None
    barrier()  # nobody repairs a file before everybody has looked
    if known is not None:
        return known

    writer = _Writer(model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
    empty = writer.text("")
    part = _encode_share(preferences, config, writer, progress, rank, world)
    parts = [manifest.with_suffix(f".{r}-of-{world}.part") for r in range(world)]
    write_atomic(parts[rank], "".join(json.dumps(row) + "\n" for row in part).encode())
    barrier()
    encoded = _merge(parts, empty, memory)
    if rank == 0:
        write_manifest(manifest, encoded)
    barrier()
    parts[rank].unlink(missing_ok=True)
    if not encoded.counts.usable:
        first = f"; {encoded.counts.skipped[0]}" if encoded.counts.skipped else ""
        raise UserError(f"{preferences.name}: nothing to learn from: {encoded.counts.text}{first}")
    return encoded


def _encode_share(
    preferences: Preferences, config: DataConfig, writer: "_Writer", progress: bool, rank: int, world: int
) -> list[dict[str, Any]]:
    """Encode this process's rows; one json object a row, with its index."""
    rows = islice(enumerate(preferences.rows()), rank, None, world)
    total = None if preferences.total is None else len(range(rank, preferences.total, world))
    part: list[dict[str, Any]] = []
    bar = tqdm(total=total, desc="encoding", unit="pair", disable=not progress or rank > 0)
    with bar:
        for index, prepared in _ahead(lambda row: (row[0], _prepare(row[1], config, writer)), rows, config.workers):
            if isinstance(prepared, Skipped):
                if not prepared.unlabelled:
                    tqdm.write(f"skipped {prepared.where}: {prepared.reason}") if progress else None
                part.append({"index": index, "skipped": asdict(prepared)})
            else:
                writer.remaining = None if total is None else total - bar.n
                writer.text(prepared.record.prompt)
                writer.images(prepared.missing)
                part.append({"index": index, **asdict(prepared.record)})
            bar.update()
        writer.flush()
    return part


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
    """Find an example's keys, and the pixels of what is to be encoded. Runs in threads: PIL decodes without the GIL."""
    if isinstance(example, Skipped):
        return example
    try:
        contents = [image.read() for image in example.images]
        names = [digest(content) for content in contents]
        group = cuts([image_size(content) for content in contents], config, digest(*(name.encode() for name in names)))
        images, missing = [], []
        for content, name, cut in zip(contents, names, group, strict=True):
            keys = [writer.latent_key(name, cut, flipped) for flipped in ([False, True] if config.flip else [False])]
            images.append(EncodedImage(keys[0], keys[1] if config.flip else None, cut))
            if not all(writer.has(key) for key in keys):
                pixels = cut_out(decode(content), cut)
                missing += list(zip(keys, [pixels, pixels.flip(-1)], strict=False))
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return Skipped(f"unreadable image ({reason})", example.where)
    record = Record(example.prompt, writer.text_key(example.prompt), tuple(images), example.scores, example.where)
    return _Prepared(record, missing)


class _Writer:
    """Collects what is missing into batches of equal shape, encodes them and writes the files."""

    def __init__(self, model: Encoders, store: Store, batch_size: int, dtype: torch.dtype):
        self.remaining: int | None = None  # rows to come, if known: for the message when the disk is full
        self._model = model
        self._store = store
        self._batch_size = batch_size
        self._dtype = dtype
        self._identity = f"{VERSION} {model.fingerprint} {dtype}"
        self._pixels: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._prompts: dict[str, str] = {}
        self._seen: set[str] = set()  # text keys that are there or on the way
        self._files = self._bytes = 0

    def latent_key(self, content: str, cut: Cut, flipped: bool) -> str:
        geometry = [cut.resized, cut.corner, cut.target, flipped]
        return digest(f"latents {self._identity} {content} {geometry}".encode())

    def text_key(self, prompt: str) -> str:
        return digest(f"text {self._identity} {prompt}".encode())

    def has(self, latent_key: str) -> bool:
        return self._store.read("latents", latent_key) is not None

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

    def _flush_prompts(self) -> None:
        if not self._prompts:
            return
        with torch.no_grad():
            embeddings = self._model.family.encode_prompts(self._model.pipeline, list(self._prompts.values()))
        for row, key in enumerate(self._prompts):
            self._write("text", key, {name: tensor[row] for name, tensor in embeddings.items()})
        self._prompts = {}

    def _write(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        stored = {name: tensor.detach().to("cpu", self._dtype).contiguous() for name, tensor in tensors.items()}
        if not all(tensor.isfinite().all() for tensor in stored.values()):
            part, advice = ("VAE", ", or a VAE that bears float16 (model.vae)") if kind == "latents" else ("text encoder", "")
            raise UserError(f"the {part} gives NaN or infinity in its precision; set model.dtype to bfloat16 or float32{advice}")
        try:
            self._bytes += self._store.write(kind, key, stored)
            self._files += 1
        except OSError as error:
            size = sum(tensor.nbytes for tensor in stored.values())
            mean = self._bytes / self._files if self._files else size
            raise no_space(error, self._store.folder, int(max(size, 2 * mean * (self.remaining or 0)))) from error


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
