"""AnimateDiff (Guo et al. 2023, arXiv 2307.04725): Stable Diffusion 1.x with attention over time between its
blocks, whose weights come from a motion adapter.

``model.path`` is a folder of a whole AnimateDiff pipeline, or a Stable Diffusion 1.x beside
``model.motion_adapter`` (``motion.py`` puts them together). What is trained is the network that both make:
LoRA's default targets are the attentions over time as well as those of the images, and full fine-tuning
trains all of it. A network takes as many frames as its adapter has positions for, 32 or 24.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.models.codecs import FrameByFrame
from diffalign.models.families.sd15 import CONFIGS as SD15_CONFIGS
from diffalign.models.families.sd15 import SD15

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    **SD15_CONFIGS,
    "unet": {  # stable-diffusion-v1-5 with animatediff-motion-adapter-v1-5-2
        "sample_size": 64,
        "in_channels": 4,
        "cross_attention_dim": 768,
        "num_attention_heads": 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "motion_max_seq_length": 32,
        "use_motion_mid_block": True,
    },
}


ANIMATEDIFF = replace(
    SD15,
    name="animatediff",
    network_class="UNetMotionModel",
    codec=FrameByFrame(longest=lambda config: int(config["motion_max_seq_length"])),
    configs=CONFIGS,
    load_arguments={},
    text_per_frame=True,
)
