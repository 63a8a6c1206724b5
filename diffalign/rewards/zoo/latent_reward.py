"""LPO's latent reward model: scores noisy latents by the encoder half of the diffusion model itself.

Zhang et al. 2025, arXiv 2502.01051, section 3 (Kwai-Kolors/LPO, models casiatao/LRM). The UNet is shown
latents with the prompt and without; the means over space of what each level makes of them stand side by side,
those of the middle guided, u + 7.5 (c - u), the others with the prompt; one matrix makes an embedding of it,
and the score is exp(logit_scale) cos(text, image). No image is decoded, and gradients flow to latents.

A source is ``sd15`` or ``sdxl`` (published), or a downloaded folder of one (unet/, text_encoder/,
text_encoder_2/ of an SDXL, state_dict.pt). Tokenizers and autoencoder are those of the base model, from the
hub or as ``FOLDER@BASE``.

What differs from the released code: a finished image is the mean of what the autoencoder makes of it, at
timestep 0 and without noise, where theirs is a draw with noise; and it is resized bicubically.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.codecs import Images as Codec
from diffalign.models.sources import user_errors
from diffalign.models.unet_encoder import encoder_features, load_autoencoder, load_part, load_unet_encoder
from diffalign.rewards.checkpoints import fetched, fill, read_plain
from diffalign.rewards.images import Images, in_batches
from diffalign.rewards.preprocess import Stretch
from diffalign.rewards.registry import REGISTRY, Place
from diffalign.rewards.zoo.clip import unit
from diffalign.rewards.zoo.step_aware import timesteps

GUIDANCE = 7.5
_NAME = "latent_reward"
_PUBLISHED = ("sd15", "sdxl")
_HEADS = "state_dict.pt"
_SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@runtime_checkable
class NoisyReward(Protocol):
    """A Reward that also scores noisy latents."""

    def __call__(self, images: Any, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 scores of finished images."""
        ...

    def of_latents(self, latents: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """(B,) float32 scores of latents (B, *d) that were drawn from times ``t`` (B,) in [0, 1]."""
        ...


@dataclass(frozen=True)
class Reader:
    """A text encoder and its tokenizer."""

    tokenizer: Any
    encoder: Any

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Any:
        """All that the encoder says of prompts, which are cut at the tokenizer's length."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encoder(ids.to(self.encoder.device), output_hidden_states=True)


@dataclass(frozen=True)
class LatentReward:
    """A NoisyReward. It is no ``TimedReward``, for that judges clean estimates.

    Attributes:
        unet: the encoder half of a UNet2DConditionModel.
        vae: the autoencoder that makes latents of finished images.
        readers: one of a Stable Diffusion 1 or 2, two of an SDXL.
        visual: features of the UNet to the embedding, float32.
        textual: pooled text to the embedding, float32; of an SDXL it is one already.
        scale: exp(logit_scale).
        batch_size: images at once; the network sees each twice.
    """

    unet: Any
    vae: Any
    readers: tuple[Reader, ...]
    visual: nn.Module
    textual: nn.Module
    scale: float
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 scores of finished images: those of their latents at time 0.

        PIL images take the exact path, pixels (B, 3, H, W) in [0, 1] the differentiable one.
        """
        return in_batches(
            lambda some, texts: self._score(self.encode(some), texts, torch.zeros(len(texts))),
            images, prompts, self.batch_size,
        )  # fmt: skip

    def of_latents(
        self, latents: Float[Tensor, "B C h w"], prompts: Sequence[str], t: Float[Tensor, " B"]
    ) -> Tensor:
        """(B,) float32 scores of noisy latents, differentiable in them.

        Args:
            latents: in the network's scale, of any size; the model was trained on ``side`` pixels square.
            prompts: B.
            t: (B,) times in [0, 1]. Of a sampler's step from t to s the published code shows the model x_s
                and tells it t, the time that they were drawn from.

        Raises:
            ValueError: counts that do not fit, another number of channels, a time outside [0, 1].
        """
        channels = self.unet.config.in_channels
        if not len(latents) == len(prompts) == len(t) or latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)}, {len(prompts)} prompts and times of shape "
                f"{tuple(t.shape)}; allowed: (B, {channels}, h, w), B and (B,)"
            )
        steps = timesteps(t)
        scores = [
            self._score(latents[i : i + n], list(prompts[i : i + n]), steps[i : i + n])
            for n in [self.batch_size]
            for i in range(0, len(latents), n)
        ]
        return torch.cat(scores) if scores else torch.zeros(0)

    @property
    def side(self) -> int:
        """Pixels of the square that it was trained on."""
        return self.unet.config.sample_size * Codec().downscale(self.vae.config)

    def encode(self, images: Images) -> Float[Tensor, "B C h w"]:
        """Latents of finished images in the network's scale, float32; gradients flow to pixels."""
        return Codec().encode(self.vae, Stretch(self.side)(images, self.vae.device))[0]

    def _score(self, latents: Tensor, prompts: list[str], timestep: Tensor) -> Tensor:
        count, device = len(prompts), self.unet.device
        different = list(dict.fromkeys(prompts))  # a rollout judges many candidates of a few prompts
        states, pooled = self._read([*different, ""])
        owner = torch.tensor([different.index(prompt) for prompt in prompts], device=device)
        both = torch.cat([owner, torch.full_like(owner, len(different))])
        added = {}
        if len(self.readers) > 1:
            sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=device)
            added = {"text_embeds": pooled[both], "time_ids": sizes.float().expand(2 * count, -1)}
        x_t = latents.to(device, self.unet.dtype).repeat(2, 1, 1, 1)
        levels, middle = encoder_features(self.unet, x_t, timestep.to(device).repeat(2), states[both], added)
        looks = [level[:count].float().mean((2, 3)) for level in levels]
        conditional, unconditional = middle.float().mean((2, 3)).chunk(2)
        looks.append(unconditional + GUIDANCE * (conditional - unconditional))
        look, word = self.visual(torch.cat(looks, 1)), self.textual(pooled[owner].float())
        return self.scale * (unit(look) * unit(word)).sum(-1)

    def _read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return what the UNet is told of prompts, (B, L, D), and pooled (B, E)."""
        outputs = [reader(prompts) for reader in self.readers]
        if len(outputs) == 1:
            return outputs[0].last_hidden_state, outputs[0].pooler_output
        return torch.cat([one.hidden_states[-2] for one in outputs], -1), outputs[1].text_embeds


def load(source: str | None, place: Place) -> LatentReward:
    """Return a published latent reward model, or a downloaded folder.

    Raises:
        UserError: no source, nothing there, the hub cannot be reached, or weights of another model.
    """
    path, _, base = (source or "").partition("@")
    if path in _PUBLISHED:
        where, inside = REGISTRY[_NAME].checkpoint, f"lrm_{path}/"
        heads = fetched(_NAME, where, f"{inside}{_HEADS}", "FOLDER")
    elif Path(path, _HEADS).is_file():
        where, inside, heads = path, "", Path(path, _HEADS)
    else:
        raise UserError(
            f"reward {_NAME!r} needs a model that belongs to the diffusion model whose latents it judges, "
            f"and {path!r} is none; allowed: {_NAME}:sd15, {_NAME}:sdxl (published), or {_NAME}:FOLDER with "
            f"unet/, text_encoder/ and {_HEADS}"
        )
    dtype = getattr(torch, place.dtype)
    unet = load_unet_encoder(_NAME, where, f"{inside}unet", dtype)
    large = unet.config.addition_embed_type == "text_time"
    base = base or (_SDXL if large else _SD15)
    readers = _readers(where, inside, base, dtype, 2 if large else 1)
    visual, textual, scale = _heads(heads, unet.config, readers)
    vae = load_autoencoder(_NAME, base)
    for network in (unet, vae, visual, textual, *(reader.encoder for reader in readers)):
        network.to(place.device)
    return LatentReward(unet, vae, readers, visual, textual, scale, place.batch_size)


def _readers(where: str, inside: str, base: str, dtype: torch.dtype, count: int) -> tuple[Reader, ...]:
    """Return the model's own text encoders with the tokenizers of its base."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    readers = []
    for cls, suffix in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2"))[:count]:
        encoder = load_part(_NAME, cls, where, f"{inside}text_encoder{suffix}", dtype)
        with user_errors(_NAME, base):
            tokenizer = CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{suffix}")
        if len(tokenizer) != encoder.config.vocab_size:  # an empty folder makes a tokenizer, too
            raise UserError(
                f"{_NAME}={where!r}: its text_encoder{suffix} knows {encoder.config.vocab_size} tokens, but "
                f"tokenizer{suffix} of {base!r} has {len(tokenizer)}; give its base as {_NAME}:FOLDER@BASE"
            )
        readers.append(Reader(tokenizer, encoder))
    return tuple(readers)


def _heads(path: Path, unet: Any, readers: Sequence[Reader]) -> tuple[nn.Module, nn.Module, float]:
    """Both projections in float32, and exp(logit_scale)."""
    stored = read_plain(_NAME, path)
    words, large = readers[-1].encoder.config, len(readers) > 1
    try:
        look, scale = stored["visual_projection"]["weight"], torch.as_tensor(stored["logit_scale"])
        word = None if large else stored["text_projection"]["weight"]
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"reward {_NAME!r}: {str(path)!r} is another model's checkpoint: no visual_projection, "
            f"logit_scale and, of one text encoder, text_projection ({type(error).__name__}: {error})"
        ) from error
    channels = unet.block_out_channels
    width = words.projection_dim if word is None else len(word)
    visual = _linear(sum(channels) + channels[-1], width, look, f"visual_projection of {path}")
    if word is None:
        return visual, nn.Identity(), float(scale.float().exp())
    textual = _linear(words.hidden_size, width, word, f"text_projection of {path}")
    return visual, textual, float(scale.float().exp())


def _linear(inner: int, outer: int, weight: Tensor, source: str) -> nn.Module:
    with torch.device("meta"):
        linear = nn.Linear(inner, outer, bias=False)
    fill(_NAME, linear, {"weight": weight}, source)
    return linear.float().requires_grad_(False)
