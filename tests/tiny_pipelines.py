"""Tiny pipelines of the real classes with random weights, written as folders that diffusers loads.

For tests that need the right code paths and not a good model: `make_sdxl(folder)`, `make_sd15(folder)`.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16
TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(pad: str = END) -> CLIPTokenizer:
    """Bytes and a few merges: any text can be encoded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("a", "</w>")][:2]
    names = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    return CLIPTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        model_max_length=TOKENS,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=pad,
    )


def text_config(tok: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )


def vae(**changes: Any) -> AutoencoderKL:
    """Eight times smaller latents of 4 channels, as the real ones."""
    values: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 64,
    }
    return AutoencoderKL(**(values | changes))


def unet(**changes: Any) -> UNet2DConditionModel:
    values: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(values | changes))


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_sd15(folder: Path, seed: int = 0) -> Path:
    """A random StableDiffusionPipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok = tokenizer()
        pipeline = StableDiffusionPipeline(
            vae=vae(),
            text_encoder=CLIPTextModel(text_config(tok)),
            tokenizer=tok,
            unet=unet(),
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def make_sdxl(folder: Path, seed: int = 0) -> Path:
    """A random StableDiffusionXLPipeline in ``folder``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tok, tok_2 = tokenizer(), tokenizer(pad="!")
        pipeline = StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.13025),
            text_encoder=CLIPTextModel(text_config(tok)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(tok_2)),
            tokenizer=tok,
            tokenizer_2=tok_2,
            unet=unet(
                cross_attention_dim=2 * WIDTH,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + WIDTH,
            ),
            scheduler=scheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder
