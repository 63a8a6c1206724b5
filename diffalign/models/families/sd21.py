"""Stable Diffusion 2.x (Rombach et al. 2022, arXiv 2112.10752): SD 1.x with OpenCLIP's ViT-H/14.

2.1 at 768 px predicts v, 2.1-base epsilon: their schedulers say which. The text encoder is used without its
last layer (23 of 24), as the released configuration has it.
"""

from collections.abc import Mapping
from typing import Any

from diffalign.models.families.sd15 import CONFIGS as SD15
from diffalign.models.families.sd15 import StableDiffusion1

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "unet": {  # stable-diffusion-2-1: what differs from UNet2DConditionModel's defaults
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),  # in fact the number of heads
        "block_out_channels": (320, 640, 1280, 1280),
        "use_linear_projection": True,
    },
    "vae": {**SD15["vae"], "sample_size": 768},
    "text_encoder": {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K
        "architectures": ["CLIPTextModel"],
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
}

SD21 = StableDiffusion1(name="sd21", configs=CONFIGS)
