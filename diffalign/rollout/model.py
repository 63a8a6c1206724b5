"""The model of a rollout besides its denoiser: it encodes prompts and decodes latents to pixels."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

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

    def encode(self, prompts: Sequence[str]) -> tuple[Cond, Cond]:
        """Return (conditions, negative conditions), each (len(prompts), ...), on the CPU."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Return the pixels (B, 3, H, W) in [0, 1], float32, of latents (B, *d)."""
        ...

    def opened(self) -> AbstractContextManager[None]:
        """Enter a context in which encoders and decoder are on the accelerator."""
        ...


class PipelineRolloutModel:
    """A loaded pipeline at one resolution. Encoded prompts are cached up to a budget of memory."""

    def __init__(
        self,
        model: LoadedModel,
        resolution: int,
        batch_size: int = 4,
        decoder: Callable[[Tensor], Tensor] | None = None,
        budget: int = 2 * 2**30,
    ):
        """Wrap a model.

        Args:
            model: the pipeline.
            resolution: pixels of a square image.
            batch_size: prompts that are encoded, or latents that are decoded, at once.
            decoder: latents to pixels in [0, 1] instead of the model's own VAE.
            budget: bytes of encoded prompts that are cached between calls; the least recently used go first.
        """
        self._model, self._batch, self._budget = model, batch_size, budget
        self._decode = decoder or model.decode
        self._parts = () if decoder else ("vae",)
        self.shape = model.latent_shape(resolution, resolution)
        size = torch.tensor([[float(resolution), float(resolution)]])
        self._sizes = model.micro_conditions(size, torch.zeros(1, 2), size)
        self._texts: OrderedDict[str, Rows] = OrderedDict()
        self._bytes = 0
        self._negative: Rows | None = None
        self.encoded = 0  # prompts that went through the text encoders

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self._model.device

    def encode(self, prompts: Sequence[str]) -> tuple[Cond, Cond]:
        """Return text and size conditions, (B, ...) on the CPU, from the cache where it has them."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._remember(new)
        assert self._negative is not None
        texts = [self._texts[prompt] for prompt in prompts]
        cond = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
        cond |= {k: v.expand(len(texts), *v.shape[1:]) for k, v in self._sizes.items()}
        negative = {k: v.expand(len(texts), *v.shape[1:]) for k, v in self._negative.items()}
        for prompt in dict.fromkeys(prompts):
            self._texts.move_to_end(prompt)
        while self._bytes > self._budget:
            self._bytes -= _bytes(self._texts.popitem(last=False)[1])
        return cond, negative

    def _remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts with the text encoders on the accelerator, and cache the results."""
        encoders = self._model.text_encoders
        self._model.move_encoders(self._model.device, encoders)
        for start in range(0, len(prompts), self._batch):
            some = list(prompts[start : start + self._batch])
            rows = {name: value.cpu() for name, value in self._model.encode_prompts(some).items()}
            for i, prompt in enumerate(some):
                # copies: a view would keep the whole batch in memory
                self._texts[prompt] = {k: v[i].clone() for k, v in rows.items()}
                self._bytes += _bytes(self._texts[prompt])
            self.encoded += len(some)
        if self._negative is None:
            self._negative = {name: value.cpu() for name, value in self._model.negative(1).items()}
        self._model.move_encoders("cpu", encoders)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, H, W) in [0, 1] on the CPU, decoded ``batch_size`` at a time."""
        return torch.cat([self._decode(part).cpu() for part in latents.split(self._batch)])

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Move the VAE to the accelerator while it decodes, and off again."""
        self._model.move_encoders(self._model.device, self._parts)
        try:
            yield
        finally:
            self._model.free_encoders()


def _bytes(rows: Rows) -> int:
    return sum(value.nbytes for value in rows.values())
