"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders; the UNet is told sizes.

The micro-conditioning of section 2.2 is six numbers: original height and width, top and left of the crop,
target height and width. They stay float32 whatever the network's dtype, since bfloat16 cannot tell 1023 from
1024; the UNet embeds them in float32 itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import (
    Usual,
    encoded_by_pipeline,
    rows,
)
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "unet": {  # stable-diffusion-xl-base-1.0: what differs from UNet2DConditionModel's defaults
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),  # in fact the number of heads
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {
        "sample_size": 1024,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.13025,
    },
    "text_encoder": {  # openai/clip-vit-large-patch14
        "architectures": ["CLIPTextModel"],
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
    "text_encoder_2": {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
        "architectures": ["CLIPTextModelWithProjection"],
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}


class SizeConditioned(Usual):
    """What UNets of SDXL's kind share: sizes and a pooled vector of the prompt are conditions."""

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """1: the UNet pads what its levels cannot halve."""
        return 1

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """Return the outputs of the encoders in float32.

        ``encoder_hidden_states`` (B, tokens, 2048) are, in SDXL, the penultimate layers of both side by side,
        ``text_embeds`` (B, 1280) the second one's projection.
        """
        states, _, pooled, _ = encoded_by_pipeline(pipeline, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states.float(), "text_embeds": pooled.float()}

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Zeros where the pipeline's ``force_zeros_for_empty_prompt`` says so, else the empty prompt's."""
        _, states, _, pooled = encoded_by_pipeline(pipeline, [""], do_classifier_free_guidance=True)
        return rows({"encoder_hidden_states": states.float(), "text_embeds": pooled.float()}, n)

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """``time_ids`` (B, 6) in float32."""
        return {"time_ids": torch.cat([original_size, crop, target_size], dim=1).float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the UNet's raw prediction, (B, C, H, W)."""
        prediction: Tensor = network(
            x_t,
            model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            added_cond_kwargs={
                "text_embeds": cond["text_embeds"].to(x_t.dtype),
                "time_ids": cond["time_ids"],
            },
            return_dict=False,
        )[0]
        return prediction


@dataclass(frozen=True)
class StableDiffusionXL(SizeConditioned):
    """The family ``sdxl``."""

    name: str = "sdxl"
    network_name: str = "unet"
    network_class: str = "UNet2DConditionModel"
    codec: Codec = Images(shifted=False)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    optional_encoders: tuple[str, ...] = ()
    load_arguments: Mapping[str, Any] = field(default_factory=dict)

    token_order: ClassVar[tuple[str, ...]] = ("tokenizer",)
    clip_layer: ClassVar[int] = -2
    """The encoders' last hidden states but one."""

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of the real-size base model's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return the first tokenizer and its full length."""
        return "tokenizer", int(pipeline.tokenizer.model_max_length)

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        unet, tokens = configs["unet"], configs["text_encoder"]["max_position_embeddings"]
        sizes = 6 * unet["addition_time_embed_dim"]
        return {
            "encoder_hidden_states": (tokens, unet["cross_attention_dim"]),
            "text_embeds": (unet["projection_class_embeddings_input_dim"] - sizes,),
            "time_ids": (6,),
        }


SDXL = StableDiffusionXL()
