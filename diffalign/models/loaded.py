"""A loaded pipeline with the operations of training: encode prompts and pixels, decode, denoise."""

import hashlib
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.diffusion.paths import EDM, VariancePreserving
from diffalign.diffusion.samplers import timesteps
from diffalign.diffusion.spans import ALL, span_of
from diffalign.models.codecs import Codec
from diffalign.models.denoisers import Experts, Negated, NetworkDenoiser
from diffalign.models.experts import FIRST, SECOND
from diffalign.models.families.base import Family, latent_shape, present_encoders
from diffalign.models.model_sources import ModelSources
from diffalign.models.precision import only_errors
from diffalign.models.text_encoders import encode_parts, negative_parts
from diffalign.types import Denoiser, Path, Target

logger = logging.getLogger(__name__)

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # views of bits, by size


@dataclass(eq=False)
class LoadedModel:
    """A diffusers pipeline, frozen and in evaluation mode, with its family and noising path.

    Attributes:
        family: how prompts are encoded and the network called.
        pipeline: the diffusers pipeline; its network is the one that is trained, so sampling from it shows
            the policy.
        path: the noising path of its scheduler.
        target: what its network predicts.
        source: its origin, for messages and the model card.
        dtype: of the frozen weights.
        truncated_prompts: number of prompts so far that were too long for the tokenizer.
        tiled: whether the VAE works by tiles, whose blended edges change the latents.
        trained_encoders: text encoders that are trained; prompts become tokens for them.
        carried: the LoRA of the expert that is not trained, by module (``lora_formats.Factors``): of an
            earlier run, saved with this one's.
    """

    family: Family
    pipeline: Any
    path: Path
    target: Target
    source: str
    dtype: torch.dtype
    truncated_prompts: int = 0
    tiled: bool = False
    trained_encoders: tuple[str, ...] = ()
    carried: dict[str, Any] = field(default_factory=dict)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The loaded networks by component: that which is trained, and then the other one of two experts."""
        own = self.family.network_name
        names = [own, *(name for name in (FIRST, SECOND) if name != own)] if own in (FIRST, SECOND) else [own]
        found = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def split(self) -> bool:
        """Whether the network is one of two experts."""
        return span_of(self.path) != ALL

    @property
    def network(self) -> nn.Module:
        """The module to train."""
        network: nn.Module = getattr(self.pipeline, self.family.network_name)
        return network

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.network.parameters()).device

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that encode prompts, those that this pipeline has."""
        return present_encoders(self.family, self.pipeline)

    @property
    def codec(self) -> Codec:
        """The codec of its autoencoder, for the network's number of frames."""
        return self.family.codec.fitted(self.network_config)

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return self.codec.downscale(self.pipeline.vae.config)

    @property
    def multiple(self) -> int:
        """The number of pixels that the sides of an image must be multiples of."""
        return self.downscale * self.family.patch(self.network_config)

    @property
    def network_config(self) -> Mapping[str, Any]:
        """The network's configuration."""
        config: Mapping[str, Any] = getattr(self.pipeline, self.family.network_name).config
        return config

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """(C, h, w) of an image of so many pixels, (C, F, h, w) of a video of so many frames.

        Raises:
            UserError: sides or frames that the model does not take.
        """
        return latent_shape(
            self.family, self.pipeline.vae.config, self.network_config, (height, width), frames
        )

    def usable_frames(self, frames: int) -> int:
        """Return the largest number of frames, at most ``frames``, that the autoencoder takes; images: 1."""
        return self.codec.usable_frames(self.pipeline.vae.config, frames)

    def latent_frames(self, frames: int) -> int:
        """Return the number of latent frames of so many frames."""
        return self.codec.latent_frames(self.pipeline.vae.config, frames)

    def frames_of(self, latent_frame: int) -> range:
        """Return the frames of a latent frame."""
        return self.codec.frames_of(self.pipeline.vae.config, latent_frame)

    def grid(self, steps: int, shape: tuple[int, ...]) -> Float[Tensor, " S"]:
        """Return (steps + 1,) descending float64 sampling times of latents of this shape, ended by 0.

        Of a flow model they are the stock pipeline's own, shift included; of a variance-preserving one DDIM's
        in the spacing of its scheduler; of EDM's preconditioning the scheduler's sigmas down to sigma_min.
        """
        if isinstance(self.path, EDM):
            return self.path.grid(steps)
        if isinstance(self.path, VariancePreserving):
            spacing = self.pipeline.scheduler.config.get("timestep_spacing", "leading")
            return timesteps(steps, self.path.steps, spacing)
        return self.family.grid(self.pipeline.scheduler, self.network_config, steps, shape)

    def denoiser(self) -> NetworkDenoiser:
        """Return the network as a denoiser, its inputs in its own dtype."""
        negated = isinstance(self.path, EDM) and self.path.negated
        call = Negated(self.family.call) if negated else self.family.call
        return NetworkDenoiser(self.network, self.path, self.target, call, dtype=self.dtype)

    def sampler(self, own: Denoiser | None = None, autocast: torch.dtype | None = None) -> Denoiser:
        """Return the denoiser of the whole model: of two experts each at its times, where both are loaded.

        ``own`` calls the first network (None: ``denoiser()``); ``autocast`` is the precision of the other's.
        """
        own, plain = own or self.denoiser(), replace(self.denoiser(), autocast=autocast)
        others = [replace(plain, network=network) for network in list(self.networks.values())[1:]]
        return Experts(own, others[0]) if others else own

    @property
    def data_std(self) -> float:
        """Std of the pipeline's latents: EDM's sigma_data, by which they are divided here; else 1."""
        return self.path.sigma_data if isinstance(self.path, EDM) else 1.0

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions, one row per prompt, float32, where the text encoders are.

        Equal to what the stock pipeline computes; by encoder, with tokens in place of embeddings of those
        that are trained (``text_encoders``). Prompts longer than the tokenizer's maximum lose their end:
        the first one is warned about, and ``truncated_prompts`` counts them all.
        """
        name, limit = self.family.reader(self.pipeline)
        tokenizer = text_tokenizer(getattr(self.pipeline, name))
        with only_errors("diffusers", "transformers"):  # their own warnings come per batch and quote padding
            lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
            result = (
                encode_parts(self.pipeline, self.family, self.trained_encoders, prompts)
                if self.trained_encoders
                else self.family.encode_prompts(self.pipeline, prompts)
            )
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        if lengths[longest] > limit and not self.truncated_prompts:
            logger.warning(
                "a prompt has %d tokens, the text encoder reads %d: the end of it and its like is lost: %r",
                lengths[longest],
                limit,
                textwrap.shorten(prompts[longest], 120, placeholder="..."),
            )
        self.truncated_prompts += sum(length > limit for length in lengths)
        return result

    def negative(self, n: int) -> dict[str, Tensor]:
        """Text conditions of the stock pipeline's default negative prompt, (n, ...) float32."""
        if self.trained_encoders:
            return negative_parts(self.pipeline, self.family, self.trained_encoders, n)
        return self.family.negative(self.pipeline, n)

    @property
    def sources(self) -> ModelSources | None:
        """How it takes a source image; None: it takes none."""
        taken = self.family.sources
        return None if taken is None else ModelSources(self.pipeline, self.codec, taken)

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """Size conditions from (height, width), (top, left), (height, width) in pixels."""
        return self.family.micro_conditions(original_size, crop, target_size)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, std) of the VAE's posterior in the scale that the network sees, float32.

        Args:
            pixels: (B, 3, H, W), or (B, 3, F, H, W) of videos, in [-1, 1].

        Returns:
            Two tensors (B, C, h, w) or (B, C, f, h, w).
        """
        mean, std = self.codec.encode(self.pipeline.vae, pixels)
        return mean / self.data_std, std / self.data_std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1], float32, of latents in the network's scale; see ``encode_pixels`` for shapes."""
        return self.codec.decode(self.pipeline.vae, latents * self.data_std)

    def move_encoders(self, device: torch.device | str, names: Sequence[str] | None = None) -> None:
        """Put VAE and text encoders, or some of them, on ``device``; those that are trained stay."""
        for name in ("vae", *self.text_encoders) if names is None else names:
            if name not in self.trained_encoders:
                getattr(self.pipeline, name).to(device)

    def free_encoders(self) -> None:
        """Move VAE and text encoders off the accelerator, once a cache holds their output."""
        self.move_encoders("cpu")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the VAE, text encoders and tokenizers, weights included: the key of caches.

        Of every tensor an exact sum over its bits and a sample of its values go in, so two checkpoints never
        share a cache, and device or process make no difference. Shapes of conditions go in as well: how many
        tokens a prompt becomes is a setting.
        """
        digest = hashlib.sha256(self.family.name.encode() + b" tiled" * self.tiled)
        if self.data_std != 1:
            digest.update(f" latents over {self.data_std}".encode())
        digest.update("".join(f" tokens of {name}" for name in self.trained_encoders).encode())
        names = ("vae", *self.text_encoders)
        configs = {
            name: plain_config(getattr(self.pipeline, name)) for name in (*names, self.family.network_name)
        }
        digest.update(stable_json(self.family.cond_shapes(configs)))
        for name in names:
            module = getattr(self.pipeline, name)
            digest.update(stable_json(configs[name]))
            for part in weight_digests(module, f"{name}."):
                digest.update(part)
        for name, tokenizer in self.pipeline.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                tokenizer = text_tokenizer(tokenizer)
                digest.update(f"{name} {tokenizer.model_max_length} {tokenizer.pad_token}".encode())
                digest.update(stable_json(tokenizer.get_vocab()))
        return digest.hexdigest()[:32]


@contextmanager
def no_bars() -> Iterator[None]:
    """Diffusers and transformers draw no bars while they read local files; a download shows its own."""
    import diffusers.utils.logging as diffusers_logging
    import transformers.utils.logging as transformers_logging

    both = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in both:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in both:
            log.enable_progress_bar()


def text_tokenizer(component: Any) -> Any:
    """Return the tokenizer of a pipeline's component: itself, or that of a processor of texts and images."""
    from transformers import ProcessorMixin

    tokenizer: Any = getattr(component, "tokenizer", None) if isinstance(component, ProcessorMixin) else None
    return component if tokenizer is None else tokenizer


def plain_config(module: Any) -> Mapping[str, Any]:
    """Return the configuration of a component, of diffusers or transformers, as a mapping."""
    config: Mapping[str, Any] = module.config if isinstance(module.config, dict) else module.config.to_dict()
    return config


def stable_json(value: Any) -> bytes:
    """Canonical JSON without what says where a configuration was read from."""
    volatile = {
        "_name_or_path",
        "_commit_hash",
        "transformers_version",
        "_diffusers_version",
        "_use_default_values",
    }
    kept = {k: v for k, v in value.items() if k not in volatile}
    return json.dumps(kept, sort_keys=True, default=str).encode()


def weight_digests(module: nn.Module, prefix: str = "") -> Iterator[bytes]:
    """Yield the name, shape, type and ``tensor_digest`` of each weight of a module."""
    for name, tensor in module.state_dict().items():
        yield f"{prefix}{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        yield tensor_digest(tensor)


def tensor_digest(tensor: Tensor) -> bytes:
    """Return the exact integer sum of a tensor's bits, which any changed element changes, and 64 values."""
    if not tensor.numel() or tensor.is_meta:
        return b""
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's: numbers and scales
        return b"".join(tensor_digest(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
    step = max(1, len(bits) // 64)
    return (
        f"{int(bits.sum(dtype=torch.int64))}".encode()
        + bits[::step][:64].cpu().to(torch.int64).numpy().tobytes()
    )
