"""LPO's latent reward model: scores noisy latents with the encoder half of the diffusion model's UNet.

Zhang et al. 2025, arXiv 2502.01051, section 3 (Kwai-Kolors/LPO, models casiatao/LRM). The UNet runs with the
prompt (c) and without (u). The image features are the spatial means of each level's output with the prompt,
and of the middle block's guided output u + 7.5 (c - u), concatenated. A linear projection makes the image
embedding; the score is exp(logit_scale) cos(text, image). No image is decoded; gradients flow to the latents.

A source is ``sd15`` or ``sdxl`` (published), or a downloaded folder of one (unet/, text_encoder/,
state_dict.pt, and text_encoder_2/ for SDXL). Tokenizers and autoencoder are those of the base model, from the
hub or as ``FOLDER@BASE``.

What differs from the released code: a finished image is encoded as the mean of the autoencoder's
distribution, at timestep 0 without noise, where the released code draws a sample and adds noise; and it is
resized bicubically.
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
        """Return scores (B,), float32, of finished images."""
        ...

    def of_latents(self, latents: Tensor, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Return scores (B,), float32, of latents (B, *d) that were drawn at times ``t`` (B,) in [0, 1]."""
        ...


@dataclass(frozen=True)
class Reader:
    """A text encoder and its tokenizer."""

    tokenizer: Any
    encoder: Any

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Any:
        """Return the encoder's output with all hidden states; prompts are truncated to its context."""
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encoder(ids.to(self.encoder.device), output_hidden_states=True)


@dataclass(frozen=True)
class LatentReward:
    """A ``NoisyReward``. It is no ``TimedReward``, which scores clean estimates.

    Attributes:
        unet: the encoder half of a UNet2DConditionModel.
        vae: the autoencoder that encodes finished images.
        readers: text encoders: one for Stable Diffusion 1 and 2, two for SDXL.
        visual: projection of the UNet's features to the embedding, float32.
        textual: projection of the pooled text to the embedding, float32; the identity for SDXL.
        scale: exp(logit_scale).
        batch_size: images a forward pass; the UNet runs on twice as many latents.
    """

    unet: Any
    vae: Any
    readers: tuple[Reader, ...]
    visual: nn.Module
    textual: nn.Module
    scale: float
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, of finished images: those of their latents at time 0.

        PIL images take the exact path, pixels (B, 3, H, W) in [0, 1] the differentiable one.
        """
        return in_batches(
            lambda batch, texts: self._score(self.encode(batch), texts, torch.zeros(len(texts))),
            images, prompts, self.batch_size,
        )  # fmt: skip

    def of_latents(
        self, latents: Float[Tensor, "B C h w"], prompts: Sequence[str], t: Float[Tensor, " B"]
    ) -> Tensor:
        """Return scores (B,), float32, of noisy latents; differentiable in them.

        Args:
            latents: (B, C, h, w) in the network's scale, of any size; the model was trained on images of
                ``side`` pixels square.
            prompts: B prompts.
            t: (B,) times in [0, 1]. For a sampler's step from t to s the published code passes x_s with the
                time t, from which x_s was drawn.

        Raises:
            ValueError: counts do not match, another number of channels, or a time outside [0, 1].
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
        """The side of the square images that the model was trained on, in pixels."""
        return self.unet.config.sample_size * Codec().downscale(self.vae.config)

    def encode(self, images: Images) -> Float[Tensor, "B C h w"]:
        """Return latents of finished images in the network's scale, float32; differentiable for tensors."""
        return Codec().encode(self.vae, Stretch(self.side)(images, self.vae.device))[0]

    def _score(self, latents: Tensor, prompts: list[str], timestep: Tensor) -> Tensor:
        count, device = len(prompts), self.unet.device
        distinct = list(dict.fromkeys(prompts))  # a rollout scores many candidates of a few prompts
        states, pooled = self._read([*distinct, ""])
        owner = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
        both = torch.cat([owner, torch.full_like(owner, len(distinct))])  # with the prompt, then without
        added = {}
        if len(self.readers) > 1:
            sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=device)
            added = {"text_embeds": pooled[both], "time_ids": sizes.float().expand(2 * count, -1)}
        x_t = latents.to(device, self.unet.dtype).repeat(2, 1, 1, 1)
        levels, middle = encoder_features(self.unet, x_t, timestep.to(device).repeat(2), states[both], added)
        features = [level[:count].float().mean((2, 3)) for level in levels]
        conditional, unconditional = middle.float().mean((2, 3)).chunk(2)
        features.append(unconditional + GUIDANCE * (conditional - unconditional))
        image, text = self.visual(torch.cat(features, 1)), self.textual(pooled[owner].float())
        return self.scale * (unit(image) * unit(text)).sum(-1)

    def _read(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the text conditioning of the UNet, (B, L, D), and the pooled text (B, E)."""
        outputs = [reader(prompts) for reader in self.readers]
        if len(outputs) == 1:
            return outputs[0].last_hidden_state, outputs[0].pooler_output
        return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[1].text_embeds


def load(source: str | None, place: Place) -> LatentReward:
    """Load a published latent reward model, or a downloaded folder.

    Raises:
        UserError: no source, a missing file, the hub cannot be reached, or weights of another model.
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
    """Load the model's own text encoders with the tokenizers of its base model."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    readers = []
    for cls, suffix in ((CLIPTextModel, ""), (CLIPTextModelWithProjection, "_2"))[:count]:
        encoder = load_part(_NAME, cls, where, f"{inside}text_encoder{suffix}", dtype)
        with user_errors(_NAME, base):
            tokenizer = CLIPTokenizer.from_pretrained(base, subfolder=f"tokenizer{suffix}")
        if len(tokenizer) != encoder.config.vocab_size:  # from_pretrained accepts even an empty folder
            raise UserError(
                f"{_NAME}={where!r}: its text_encoder{suffix} knows {encoder.config.vocab_size} tokens, but "
                f"tokenizer{suffix} of {base!r} has {len(tokenizer)}; give its base as {_NAME}:FOLDER@BASE"
            )
        readers.append(Reader(tokenizer, encoder))
    return tuple(readers)


def _heads(path: Path, unet: Any, readers: Sequence[Reader]) -> tuple[nn.Module, nn.Module, float]:
    """Load both projections in float32, and exp(logit_scale)."""
    stored = read_plain(_NAME, path)
    text_config, large = readers[-1].encoder.config, len(readers) > 1
    try:
        image_weight = stored["visual_projection"]["weight"]
        scale = torch.as_tensor(stored["logit_scale"])
        text_weight = None if large else stored["text_projection"]["weight"]
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"reward {_NAME!r}: {str(path)!r} is another model's checkpoint: no visual_projection, "
            f"logit_scale and, of one text encoder, text_projection ({type(error).__name__}: {error})"
        ) from error
    channels = unet.block_out_channels
    width = text_config.projection_dim if text_weight is None else len(text_weight)
    visual = _linear(sum(channels) + channels[-1], width, image_weight, f"visual_projection of {path}")
    if text_weight is None:
        return visual, nn.Identity(), float(scale.float().exp())
    textual = _linear(text_config.hidden_size, width, text_weight, f"text_projection of {path}")
    return visual, textual, float(scale.float().exp())


def _linear(inner: int, outer: int, weight: Tensor, source: str) -> nn.Module:
    with torch.device("meta"):
        linear = nn.Linear(inner, outer, bias=False)
    fill(_NAME, linear, {"weight": weight}, source)
    return linear.float().requires_grad_(False)
