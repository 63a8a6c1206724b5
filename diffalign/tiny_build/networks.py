"""The tiny image networks, as diffusers and transformers classes, and their scheduler."""

from typing import Any

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


def autoencoder() -> AutoencoderKL:
    """Return an autoencoder: pixels (B, 3, 32, 32) in [-1, 1] to latents (B, 8, 8, 8)."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=8,
        sample_size=32,
        force_upcast=False,
        mid_block_add_attention=False,
    )


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
    """Return a CLIPTextModel for sd15; for sdxl also a CLIPTextModelWithProjection."""
    first = CLIPTextModel(text_config(tokenizer))
    return [first] if family == "sd15" else [first, CLIPTextModelWithProjection(text_config(tokenizer))]


def unet(family: str) -> UNet2DConditionModel:
    """Return the UNet of a family for latents (B, 8, 8, 8); it predicts the noise."""
    common: dict[str, Any] = {
        "sample_size": LATENT[1],
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4),  # the number of heads, despite its name in diffusers
    }
    if family == "sd15":
        return UNet2DConditionModel(block_out_channels=(32, 64), cross_attention_dim=WIDTH, **common)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
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
