"""The model of a rollout besides its denoiser: it encodes prompts and decodes latents to pixels."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.data.encoding.geometry import cut_to
from diffalign.data.encoding.images import cut_out, to_unit
from diffalign.errors import UserError
from diffalign.media.sourced import sources_of
from diffalign.models.loaded import LoadedModel
from diffalign.types import Cond

Rows = Mapping[str, Tensor]


@runtime_checkable
class RolloutModel(Protocol):
    """The parts of a model that a rollout needs besides its denoiser."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample's latents, without the batch axis."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        ...

    def encode(self, prompts: Sequence[str], ahead: Iterable[str] = ()) -> tuple[Cond, Cond]:
        """Return (conditions, negative conditions), each (len(prompts), ...), on the CPU.

        Prompts that are needed next (``ahead``) may be encoded as well, for later calls.
        """
        ...

    @property
    def at_once(self) -> int | None:
        """Samples whose pixels may be in memory at once; None: any number."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (B, 3, H, W), of videos (B, 3, F, H, W), in [0, 1], float32, of latents
        (B, *d).
        """
        ...

    def opened(self) -> AbstractContextManager[None]:
        """Enter a context in which encoders and decoder are on the accelerator."""
        ...


class PipelineRolloutModel:
    """A loaded pipeline at one size. Encoded prompts are cached up to a budget of memory.

    Attributes:
        shape: shape of the latents of one sample, without the batch axis.
        at_once: number of videos that may lie decoded in memory at once, for a model of videos.
    """

    def __init__(
        self,
        model: LoadedModel,
        size: tuple[int, int],
        *,
        batch_size: int = 4,
        decoder: Callable[[Tensor], Tensor] | None = None,
        budget: int = 2 * 2**30,
        frames: int | None = None,
        decoded_frames: int = 1,
    ):
        """Wrap a model.

        Args:
            model: the pipeline.
            size: (height, width) of an image or a frame in pixels.
            batch_size: prompts that are encoded, or latents that are decoded, at once.
            decoder: latents to pixels in [0, 1] instead of the model's own VAE.
            budget: bytes of encoded prompts that are cached between calls; the least recently used go first.
            frames: of a video; None: images.
            decoded_frames: frames of videos that may lie decoded in memory; one video always may.

        Raises:
            UserError: sides or frames that the model does not take.
        """
        self._model, self._batch, self._budget = model, batch_size, budget
        self._decode = decoder or model.decode
        self._parts = () if decoder else ("vae",)
        self.shape = model.latent_shape(*size, frames or 1)
        self.at_once = max(1, decoded_frames // frames) if frames else None
        sides = torch.tensor([size], dtype=torch.float32)
        self._sizes = model.micro_conditions(sides, torch.zeros(1, 2), sides)
        self._size, self._frames = size, frames or 1
        self._texts: OrderedDict[str, Rows] = OrderedDict()
        self._seen: dict[str, Rows] = {}  # what guidance guides away from, of prompts read with their source
        self._bytes = 0
        self._negative: Rows | None = None
        self.encoded = 0  # prompts that went through the text encoders

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._model.device

    def encode(self, prompts: Sequence[str], ahead: Iterable[str] = ()) -> tuple[Cond, Cond]:
        """Return text and size conditions, (B, ...) on the CPU, from the cache where it has them.

        Encoders are moved to the accelerator and back for prompts that it has not, and then as many of those
        ahead are encoded with them as the budget holds.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            known = {*self._texts, *new}
            self._remember(new, [prompt for prompt in dict.fromkeys(ahead) if prompt not in known])
        assert self._negative is not None
        texts = [self._texts[prompt] for prompt in prompts]
        cond = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
        cond |= {k: v.expand(len(texts), *v.shape[1:]) for k, v in self._sizes.items()}
        negative = {k: v.expand(len(texts), *v.shape[1:]) for k, v in self._negative.items()}
        if self._seen:
            own = [self._seen[prompt] for prompt in prompts]
            negative = {name: torch.stack([one[name] for one in own]) for name in own[0]}
        for prompt in dict.fromkeys(prompts):
            self._texts.move_to_end(prompt)
        while self._bytes > self._budget:
            prompt, rows = self._texts.popitem(last=False)
            self._bytes -= _bytes(rows) + _bytes(self._seen.pop(prompt, {}))
        return cond, negative

    def _remember(self, prompts: Sequence[str], ahead: Sequence[str]) -> None:
        """Encode prompts with the text encoders on the accelerator, and cache the results; of those ahead
        only what the budget holds.
        """
        encoders = self._model.text_encoders
        self._model.move_encoders(self._model.device, encoders)
        wanted = [*prompts, *ahead]
        for start in range(0, len(wanted), self._batch):
            some = wanted[start : start + self._batch]
            if start >= len(prompts) and self._bytes * (1 + len(some) / len(self._texts)) > self._budget:
                break
            rows, seen = self._encoded(some)
            for i, prompt in enumerate(some):
                # copies: a view would keep the whole batch in memory
                self._texts[prompt] = {k: v[i].clone() for k, v in rows.items()}
                self._bytes += _bytes(self._texts[prompt])
                if seen:
                    self._seen[prompt] = {k: v[i].clone() for k, v in seen.items()}
                    self._bytes += _bytes(self._seen[prompt])
            self.encoded += len(some)
        if self._negative is None:
            self._negative = {name: value.cpu() for name, value in self._model.negative(1).items()}
        self._model.move_encoders("cpu", encoders)

    def _encoded(self, prompts: list[str]) -> tuple[Rows, Rows]:
        """(conditions, the empty prompt's where it is read with the sources) of some prompts, on the CPU.

        Raises:
            UserError: sources that the model does not take, or none where it needs them.
        """
        taken, sourced = self._model.sources, sources_of(prompts)
        if not sourced:
            if taken is not None and taken.needed:
                raise UserError(
                    f"rollout.prompts: {prompts[0]!r} has no source image, and {self._model.family.name} "
                    "draws nothing without one; allowed: a prompt set with a column of it (source, path_src, "
                    "...)"
                )
            return _on_cpu(self._model.encode_prompts(prompts)), {}
        if taken is None:
            raise UserError(
                f"rollout.prompts: {prompts[0]!r} has a source image, and {self._model.family.name} takes "
                "none; allowed: prompts without one, or a model that takes sources (`diffalign models`)"
            )
        size, pixels = taken.size(self._size), []
        for image in (prompt.image for prompt in sourced):
            pixels.append(cut_out(image, cut_to((image.height, image.width), size)))
        texts = [str(prompt) for prompt in prompts]
        rows = taken.encode_prompts(texts, pixels) if taken.read else self._model.encode_prompts(texts)
        rows |= taken.encode(to_unit(torch.stack(pixels)), self._frames)
        seen = taken.encode_prompts([""] * len(pixels), pixels) if taken.read else {}
        return _on_cpu(rows), _on_cpu(seen)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W), of videos (B, 3, F, H, W), in [0, 1] on the CPU, decoded
        ``batch_size`` at a time, of videos at most ``at_once``.
        """
        size = min(self._batch, self.at_once or self._batch)
        return torch.cat([self._decode(part).cpu() for part in latents.split(size)])

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Move the VAE to the accelerator while it decodes, and off again."""
        self._model.move_encoders(self._model.device, self._parts)
        try:
            yield
        finally:
            self._model.free_encoders()


def _on_cpu(rows: Rows) -> Rows:
    return {name: value.cpu() for name, value in rows.items()}


def _bytes(rows: Rows) -> int:
    return sum(value.nbytes for value in rows.values())
