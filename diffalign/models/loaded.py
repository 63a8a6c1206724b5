"""A loaded pipeline with what training asks of it: encode prompts and pixels, decode, denoise."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.denoisers import NetworkDenoiser
from diffalign.models.family import Family
from diffalign.types import Path, Target

logger = logging.getLogger(__name__)

INTEGERS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # views of a tensor's bits, by element size


@dataclass(eq=False)
class LoadedModel:
    """A diffusers pipeline, frozen and in evaluation mode, with its family and noising path.

    Attributes:
        family: how prompts are encoded and the network called.
        pipeline: the diffusers pipeline; its network is the one that is trained, so sampling from it shows
            the policy.
        path: the noising path of its scheduler.
        target: what its network predicts.
        source: where it came from, for messages and the model card.
        dtype: of the frozen weights.
        truncated_prompts: how many prompts were too long for the tokenizer so far.
    """

    family: Family
    pipeline: Any
    path: Path
    target: Target
    source: str
    dtype: torch.dtype
    truncated_prompts: int = 0

    @property
    def network(self) -> nn.Module:
        """The module to train."""
        network: nn.Module = getattr(self.pipeline, self.family.network_name)
        return network

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.pipeline.vae.config.latent_channels)

    @property
    def downscale(self) -> int:
        """Pixels per latent along one side."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    def denoiser(self) -> NetworkDenoiser:
        """The network as a denoiser, its inputs in its own dtype."""
        return NetworkDenoiser(self.network, self.path, self.target, self.family.call, dtype=self.dtype)

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """Text conditions, one row per prompt, float32, where the text encoders are.

        Equal to what the stock pipeline computes. Prompts longer than the tokenizer's maximum lose their end:
        the first one is warned about, and ``truncated_prompts`` counts them all.
        """
        tokenizer = self.pipeline.tokenizer
        with only_errors("diffusers", "transformers"):  # their own warnings come per batch and quote padding
            lengths = [len(ids) for ids in tokenizer(prompts).input_ids]
            result = self.family.encode_prompts(self.pipeline, prompts)
        longest = max(range(len(prompts)), key=lengths.__getitem__)
        if lengths[longest] > tokenizer.model_max_length and not self.truncated_prompts:
            logger.warning(
                "a prompt has %d tokens, the text encoder reads %d: the end of it and its like is lost: %r",
                lengths[longest],
                tokenizer.model_max_length,
                prompts[longest],
            )
        self.truncated_prompts += sum(length > tokenizer.model_max_length for length in lengths)
        return result

    def negative(self, n: int) -> dict[str, Tensor]:
        """Text conditions of the stock pipeline's default negative prompt, (n, ...) float32."""
        return self.family.negative(self.pipeline, n)

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """Size conditions from (height, width), (top, left), (height, width) in pixels."""
        return self.family.micro_conditions(original_size, crop, target_size)

    @torch.no_grad()
    def encode_pixels(
        self, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """(mean, std) of the VAE's posterior in the scale that the network sees, float32.

        Args:
            pixels: in [-1, 1].
        """
        shift, scale = self._latent_affine
        with vae_precision(self.pipeline.vae) as vae:
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
        return (mean - shift.to(mean)) * scale.to(mean), std * scale.to(std)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels in [0, 1], float32, of latents in the network's scale."""
        shift, scale = self._latent_affine
        with vae_precision(self.pipeline.vae) as vae:
            latents = latents.to(vae.device, torch.float32)
            plain = latents / scale.to(latents) + shift.to(latents)
            pixels = vae.decode(plain.to(vae.dtype), return_dict=False)[0].float()
        return (pixels / 2 + 0.5).clamp(0, 1)

    def move_encoders(self, device: torch.device | str, names: Sequence[str] | None = None) -> None:
        """Put VAE and text encoders, or some of them, on ``device``."""
        for name in ("vae", *self.family.text_encoders) if names is None else names:
            getattr(self.pipeline, name).to(device)

    def free_encoders(self) -> None:
        """Move VAE and text encoders off the accelerator, once a cache holds their output."""
        self.move_encoders("cpu")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the VAE, text encoders and tokenizers, weights included: the key of caches.

        Of every tensor an exact sum over its bits and a sample of its values go in, so two checkpoints never
        share a cache, and device or process make no difference.
        """
        digest = hashlib.sha256(self.family.name.encode())
        for name in ("vae", *self.family.text_encoders):
            module = getattr(self.pipeline, name)
            config = module.config if isinstance(module.config, dict) else module.config.to_dict()
            digest.update(stable_json(config))
            for key, tensor in module.state_dict().items():
                digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
                digest.update(tensor_digest(tensor))
        for name, tokenizer in self.pipeline.components.items():
            if name.startswith("tokenizer") and tokenizer is not None:
                digest.update(f"{name} {tokenizer.model_max_length} {tokenizer.pad_token}".encode())
                digest.update(stable_json(tokenizer.get_vocab()))
        return digest.hexdigest()[:32]

    @property
    def _latent_affine(self) -> tuple[Tensor, Tensor]:
        """(shift, scale), broadcastable against latents: network latents = (VAE latents - shift) scale."""
        config = self.pipeline.vae.config
        scale = torch.tensor(float(config.scaling_factor))
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
            return mean.view(1, -1, 1, 1), scale / std.view(1, -1, 1, 1)
        return torch.tensor(float(config.get("shift_factor") or 0.0)), scale


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Loggers of these names say nothing below an error inside the context."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


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


@contextmanager
def vae_precision(vae: Any) -> Iterator[Any]:
    """The VAE in a precision that it can be trusted in: float32 where its configuration forces an upcast.

    SDXL's own VAE overflows in float16; with the fp16-fix VAE (``force_upcast`` false) nothing is cast.
    """
    stored = vae.dtype
    upcast = vae.config.force_upcast and stored in (torch.float16, torch.bfloat16)
    if not upcast:
        yield vae
        return
    with only_errors("diffusers"):  # it advises against casting
        try:
            yield vae.to(torch.float32)
        finally:
            vae.to(stored)


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


def tensor_digest(tensor: Tensor) -> bytes:
    """The exact integer sum of a tensor's bits, which any changed element changes, and 64 of its values."""
    if not tensor.numel():
        return b""
    bits = tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).flatten()
    step = max(1, len(bits) // 64)
    return (
        f"{int(bits.sum(dtype=torch.int64))}".encode()
        + bits[::step][:64].cpu().to(torch.int64).numpy().tobytes()
    )
