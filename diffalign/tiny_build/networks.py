"""The tiny image networks, as diffusers and transformers classes, and their scheduler."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
)

WIDTH = 48  # hidden width of each text encoder
TOKENS = 32  # model_max_length
LATENT = (8, 8, 8)  # channels, height, width


@dataclass(frozen=True)
class Sizes:
    """The sizes of a world's networks.

    Attributes:
        side: pixels of a side.
        latent: channels of the latents, whose sides are 8.
        autoencoder: channels of its levels; each but the first halves the sides.
        log_variance: initial bias of the posterior's log variances.
        groups: groups of the autoencoder's normalisations.
        unet: channels of its two levels.
    """

    side: int
    latent: int
    autoencoder: tuple[int, ...]
    log_variance: float
    groups: int
    unet: tuple[int, int]


SCENES = Sizes(side=32, latent=LATENT[0], autoencoder=(16, 32, 32), log_variance=0.0, groups=8, unet=(32, 64))
PATTERNS = Sizes(side=64, latent=16, autoencoder=(16, 32, 32, 64), log_variance=-5.0, groups=8, unet=(40, 80))
SIZES = {"sdxl": SCENES, "sd15": SCENES, "sdxl64": PATTERNS}


def autoencoder(sizes: Sizes = SCENES) -> AutoencoderKL:
    """Return an autoencoder: pixels (B, 3, H, H) in [-1, 1] to latents (B, C, 8, 8)."""
    levels = len(sizes.autoencoder)
    model = AutoencoderKL(
        block_out_channels=sizes.autoencoder,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=sizes.latent,
        norm_num_groups=sizes.groups,
        sample_size=sizes.side,
        force_upcast=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        # log variances of the posterior; near 0 the noise hides the means, and training starts slowly
        model.quant_conv.bias[sizes.latent :] = sizes.log_variance
    return model


def widened(sizes: Sizes, inner: AutoencoderKL) -> AutoencoderKL:
    """Return an autoencoder with one more level than `inner`, whose outer levels start as those of `inner`.

    New residual blocks start as the identity.
    """
    model = autoencoder(sizes)
    state, given = model.state_dict(), inner.state_dict()
    levels = len(sizes.autoencoder)
    for name, value in state.items():
        # the decoder's blocks are numbered from the latents outwards
        parts = name.split(".")
        if parts[:2] == ["decoder", "up_blocks"]:
            parts[2] = str(int(parts[2]) - 1)
        source = given.get(".".join(parts))
        own = "mid_block" in name or (parts[1] == "down_blocks" and int(parts[2]) == levels - 1)
        if source is not None and source.shape == value.shape and not own:
            value.copy_(source)
        elif name.endswith("conv2.weight") or name.endswith("conv2.bias"):
            value.zero_()
    model.load_state_dict(state)
    return model


def text_config(tokenizer: CLIPTokenizer, projection: int = WIDTH) -> CLIPTextConfig:
    """Return the configuration of one text encoder for this vocabulary."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=projection,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def text_encoders(family: str, tokenizer: CLIPTokenizer) -> list[Any]:
    """Return a CLIPTextModel for sd15; for others also a CLIPTextModelWithProjection."""
    first = CLIPTextModel(text_config(tokenizer))
    return [first] if family == "sd15" else [first, CLIPTextModelWithProjection(text_config(tokenizer))]


def unet(family: str) -> UNet2DConditionModel:
    """Return the UNet of a family for latents (B, C, 8, 8); it predicts the noise."""
    sizes = SIZES[family]
    common: dict[str, Any] = {
        "sample_size": LATENT[1],
        "in_channels": sizes.latent,
        "out_channels": sizes.latent,
        "block_out_channels": sizes.unet,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4),  # the number of heads, despite its name in diffusers
    }
    if family == "sd15":
        return UNet2DConditionModel(cross_attention_dim=WIDTH, **common)
    return UNet2DConditionModel(
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        **common,
    )


def scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's scheduler, with trailing spacing so that sampling starts at the last step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a CLIP in PickScore's format: patches of 4 pixels, projections of width 64."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=4,
        hidden_act="quick_gelu",
    )
    text = text_config(tokenizer, projection=64)
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64)
    )
