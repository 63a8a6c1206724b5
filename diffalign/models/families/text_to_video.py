"""ModelScope's text-to-video (Wang et al. 2023, arXiv 2308.06571) and what was fine-tuned from it, such as
Zeroscope: Stable Diffusion 2's text encoder and autoencoder of images, a UNet with convolutions and attention
over time. It is called as Stable Diffusion 1.x is.

Diffusers has no LoRA loader for this UNet: a LoRA is saved as peft saves it. Nor does it checkpoint it;
``checkpointing.py`` does.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.models.codecs import FrameByFrame
from diffalign.models.families.sd15 import CONFIGS as SD15_CONFIGS
from diffalign.models.families.sd15 import SD15

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "unet": {  # text-to-video-ms-1.7b
        "sample_size": 32,
        "in_channels": 4,
        "cross_attention_dim": 1024,
        "attention_head_dim": 64,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "vae": SD15_CONFIGS["vae"],
    "text_encoder": {  # laion/CLIP-ViT-H-14-laion2B-s32B-b79K without its last layer
        **SD15_CONFIGS["text_encoder"],
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
}


TEXT_TO_VIDEO = replace(
    SD15,
    name="text_to_video",
    network_class="UNet3DConditionModel",
    codec=FrameByFrame(),
    configs=CONFIGS,
    load_arguments={},
)
