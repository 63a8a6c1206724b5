"""Kolors (Kuaishou 2024): Stable Diffusion XL's UNet behind a ChatGLM3, which reads Chinese and English.

The UNet projects the last but one states of 256 tokens itself and takes the last token's last state as its
vector, beside the sizes that SDXL's takes. Its betas are a table of 1100 steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.sdxl import CONFIGS as SDXL_CONFIGS
from diffalign.models.families.sdxl import SizeConditioned

TOKENS = 256  # the pipeline's default

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        **SDXL_CONFIGS["unet"],
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "projection_class_embeddings_input_dim": 5632,
    },
    "vae": SDXL_CONFIGS["vae"],
    "text_encoder": {  # THUDM/chatglm3-6b-base
        "architectures": ["ChatGLMModel"],
        "num_layers": 28,
        "padded_vocab_size": 65024,
        "hidden_size": 4096,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "num_attention_heads": 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "rmsnorm": True,
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "original_rope": True,
    },
}


@dataclass(frozen=True)
class Kolors(SizeConditioned):
    """The family ``kolors``."""

    name: str = "kolors"
    network_name: str = "unet"
    network_class: str = "UNet2DConditionModel"
    codec: Codec = Images(shifted=False)
    text_encoders: tuple[str, ...] = ("text_encoder",)
    optional_encoders: tuple[str, ...] = ()
    load_arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Kolors' components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """ChatGLM's tokenizer."""
        return "tokenizer", TOKENS

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        unet = configs["unet"]
        sizes = 6 * unet["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": (TOKENS, unet["encoder_hid_dim"]),
            "text_embeds": (unet["projection_class_embeddings_input_dim"] - sizes,),
            "time_ids": (6,),
        }


KOLORS = Kolors()
