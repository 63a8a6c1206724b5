"""Encoding of the missing parts of a set: batches of equal shape through the model, then records."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.data.encoding.geometry import Cut, Size
from diffalign.data.encoding.images import to_unit
from diffalign.data.encoding.patches import pool
from diffalign.data.encoding.store import Store
from diffalign.data.reading.examples import digest
from diffalign.errors import UserError

VERSION = 1  # version of the contents of a record: part of every key


@runtime_checkable
class Encoders(Protocol):
    """The part of a loaded model (``diffalign.models.LoadedModel``) that encoding needs."""

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the encoders' results would: weights, VAE, dtype."""
        ...

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions by name, one row a prompt."""
        ...

    def negative(self, n: int) -> dict[str, Tensor]:
        """Text conditions by name that guidance guides away from by default, n rows."""
        ...

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posterior of pixels (B, 3, H, W), or of videos (B, 3, F, H, W), in [-1, 1]."""
        ...

    def usable_frames(self, frames: int) -> int:
        """Return the largest number of frames, at most ``frames``, that its autoencoder takes; for videos."""
        ...

    def latent_frames(self, frames: int) -> int:
        """Latent frames of so many frames. For videos."""
        ...

    def frames_of(self, latent_frame: int) -> range:
        """Return the frames that a latent frame is made of. For videos."""
        ...

    @property
    def sources(self) -> "SourceEncoders | None":
        """How it takes the image that others were made from; None: it takes none."""
        ...


@runtime_checkable
class SourceEncoders(Protocol):
    """How a model takes a source image."""

    @property
    def needed(self) -> bool:
        """Whether it draws nothing without one."""
        ...

    @property
    def read(self) -> bool:
        """Whether its text encoder sees the source, so that a prompt is encoded together with it."""
        ...

    def size(self, target: Size) -> Size:
        """Return the (height, width) that the source of images of this size is cut to."""
        ...

    def encode(self, pixels: Tensor, frames: int) -> dict[str, Tensor]:
        """Conditions by name, one row a source, of (B, 3, H, W) in [-1, 1]; ``frames`` of a video, or 1."""
        ...

    def encode_prompts(self, prompts: list[str], pixels: list[Tensor]) -> dict[str, Tensor]:
        """Text conditions by name of prompts read with their sources, uint8 (3, H, W) each."""
        ...


class Writer:
    """Collects missing inputs into batches of equal shape, encodes them and writes the records."""

    def __init__(self, model: Encoders, store: Store, batch_size: int, dtype: torch.dtype):
        self.rows_left: int | None = None  # remaining rows, if known: for the message about a full disk
        self.model = model
        self.store = store
        self._batch_size = batch_size
        self._dtype = dtype
        self._identity = f"{VERSION} {model.fingerprint} {dtype}"
        self._pixels: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._prompts: dict[str, tuple[str, Tensor | None]] = {}
        self._sources: dict[tuple[int, ...], dict[str, Tensor]] = {}  # by shape and frames
        self._there: set[str] = set()  # keys of latents found sound or written
        self._seen: set[str] = set()  # keys of texts and sources that are stored or buffered
        self._files = self._bytes = self._last = 0
        self._downscale = 0  # pixels a latent, along one side, once it is known

    def negative(self) -> str:
        """Encode the negative conditions if needed; return their key."""
        key = digest(f"negative {self._identity}".encode())
        if not self.store.has("text", key):
            with torch.no_grad():
                self._write("text", key, {name: row[0] for name, row in self.model.negative(1).items()})
        return key

    def latent_key(self, content: str, cut: Cut, flipped: bool) -> str:
        """Return the key of an image's or video's moments, by the digest of its file."""
        geometry = [cut.resized, cut.corner, cut.target, flipped]
        geometry += [cut.frames, cut.fps] if cut.frames else []
        return digest(f"latents {self._identity} {content} {geometry}".encode())

    def source_key(self, content: str, cut: Cut, flipped: bool) -> str:
        """Return the key of a source's conditions, by the digest of its file."""
        geometry = [cut.resized, cut.corner, cut.target, flipped, cut.frames]
        return digest(f"source {self._identity} {content} {geometry}".encode())

    def text_key(self, prompt: str, source: str = "") -> str:
        """Return the key of a prompt's embedding; ``source`` is the key of what it is read together with."""
        return digest(f"text {self._identity} {source and f'with {source} '}{prompt}".encode())

    def map_key(self, content: str, cut: Cut) -> str:
        """Return the key of a weight map, by the digest of its file."""
        geometry = [cut.resized, cut.corner, cut.target]
        return digest(f"patches {self._identity} {content} {geometry}".encode())

    def has_map(self, key: str) -> bool:
        """Return whether the store has this map, undamaged."""
        return self.store.has("patches", key)

    def has(self, key: str) -> bool:
        """Return whether the store has these latents, undamaged."""
        if key not in self._there and self.store.has("latents", key):
            self._there.add(key)
        return key in self._there

    @property
    def bytes_needed(self) -> int:
        """Return the size of the file that did not fit, or of all remaining ones if known (two images a
        row)."""
        mean = self._bytes / self._files if self._files else self._last
        return int(max(self._last, 2 * mean * (self.rows_left or 0)))

    def text(self, prompt: str, source: tuple[str, Tensor] | None = None) -> str:
        """Encode a prompt if needed; return its key.

        ``source`` is the (key, uint8 pixels (3, H, W)) of the image that it is read together with.
        """
        key = self.text_key(prompt, source[0] if source else "")
        if key not in self._seen:
            self._seen.add(key)
            if not self.store.has("text", key):
                self._prompts[key] = prompt, source[1] if source else None
        if len(self._prompts) >= self._batch_size:
            self._flush_prompts()
        return key

    def has_source(self, key: str) -> bool:
        """Whether the conditions of this source are in the store, sound, or on their way."""
        return key in self._seen or self.store.has("sources", key)

    def source(self, key: str, pixels: Tensor, frames: int) -> None:
        """See to it that a source, uint8 (3, H, W), is encoded, as soon as there is a full batch."""
        if self.has_source(key):
            return
        self._seen.add(key)
        shape = (*pixels.shape, frames)
        self._sources.setdefault(shape, {})[key] = pixels
        if len(self._sources[shape]) >= self._batch_size:
            self._flush_sources(self._sources.pop(shape), frames)

    def images(self, missing: Iterable[tuple[str, Tensor]]) -> None:
        """Buffer pixels, and encode them when a batch of their shape is full.

        Of videos, which are large, at most one batch is buffered over all shapes.
        """
        for key, pixels in missing:
            shape = tuple(pixels.shape)
            if key not in self._there:  # else written since the pixels were prepared
                # an image that occurs twice in a batch is encoded once
                self._pixels.setdefault(shape, {})[key] = pixels
            del pixels
            waits = len(self._pixels.get(shape, ()))
            if len(shape) == 4 and sum(map(len, self._pixels.values())) >= self._batch_size > waits:
                shape = max(self._pixels, key=lambda other: len(self._pixels[other]))
                waits = self._batch_size
            if waits >= self._batch_size:
                self._flush_pixels(self._pixels.pop(shape))

    def maps(self, missing: Iterable[tuple[str, str, Tensor]]) -> None:
        """Write weight maps (H, W) in the size of the latents that their images have: (1, h, w)."""
        for key, image, weights in missing:
            if not self._downscale:
                self._downscale = weights.shape[0] // self._height(image)
            size = weights.shape[0] // self._downscale, weights.shape[1] // self._downscale
            self._write("patches", key, {"weights": pool(weights, size)[None]})

    def _height(self, key: str) -> int:
        """Return the height of an image's latents, which are encoded now if they are still buffered."""
        if key not in self._there:
            self.flush()
        stored = self.store.read("latents", key)
        assert stored is not None, "latents that have just been written"
        return stored["mean"].shape[-2]

    def flush(self) -> None:
        """Encode the buffered inputs."""
        self._flush_prompts()
        for waiting in self._pixels.values():
            self._flush_pixels(waiting)
        for shape, sources in self._sources.items():
            self._flush_sources(sources, shape[-1])
        self._pixels, self._sources = {}, {}

    def _flush_pixels(self, waiting: dict[str, Tensor]) -> None:
        with torch.no_grad():
            pixels = to_unit(torch.stack(list(waiting.values())))
            mean, std = self.model.encode_pixels(pixels)
        self._downscale = pixels.shape[-2] // mean.shape[-2]
        for key, row_mean, row_std in zip(waiting, mean, std, strict=True):
            self._write("latents", key, {"mean": row_mean, "std": row_std})
            self._there.add(key)

    def _flush_sources(self, waiting: dict[str, Tensor], frames: int) -> None:
        encoders = self.model.sources
        assert encoders is not None, "a source of a model that takes none has been refused"
        with torch.no_grad():
            conditions = encoders.encode(to_unit(torch.stack(list(waiting.values()))), frames)
        self._write_rows("sources", waiting, conditions)

    def _flush_prompts(self) -> None:
        waiting, self._prompts = self._prompts, {}
        alone = {key: prompt for key, (prompt, pixels) in waiting.items() if pixels is None}
        seeing = {key: (prompt, pixels) for key, (prompt, pixels) in waiting.items() if pixels is not None}
        if alone:
            with torch.no_grad():
                self._write_rows("text", alone, self.model.encode_prompts(list(alone.values())))
        if seeing:
            encoders = self.model.sources
            assert encoders is not None, "a source of a model that takes none has been refused"
            prompts = [prompt for prompt, _ in seeing.values()]
            pixels = [one for _, one in seeing.values()]
            with torch.no_grad():
                self._write_rows("text", seeing, encoders.encode_prompts(prompts, pixels))

    def _write_rows(self, kind: str, keys: Iterable[str], conditions: dict[str, Tensor]) -> None:
        for row, key in enumerate(keys):
            self._write(kind, key, {name: tensor[row] for name, tensor in conditions.items()})

    def _write(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        stored = {
            name: row.detach().to("cpu", self._dtype if row.is_floating_point() else row.dtype).contiguous()
            for name, row in tensors.items()
        }
        if not all(tensor.isfinite().all() for tensor in stored.values()):
            advice = "set model.dtype to bfloat16 or float32"
            if kind == "latents":
                raise UserError(f"the VAE gives NaN; {advice}, or model.vae to one that bears float16")
            raise UserError(f"the text encoder gives NaN; {advice}")
        self._last = sum(tensor.nbytes for tensor in stored.values())
        self._bytes += self.store.write(kind, key, stored)
        self._files += 1
