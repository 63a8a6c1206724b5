"""Stable Diffusion 1.x (Rombach et al. 2022, arXiv 2112.10752): one CLIP text encoder and a UNet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import (
    Usual,
    encoded_by_pipeline,
    rows,
)
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "unet": {  # stable-diffusion-v1-5: what differs from UNet2DConditionModel's defaults
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "vae": {
        "sample_size": 512,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "scaling_factor": 0.18215,
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
}


_ONE = {"num_images_per_prompt": 1}  # which these pipelines want said


@dataclass(frozen=True)
class StableDiffusion1(Usual):
    """The family ``sd15``, and with other fields those of videos that are called as it is.

    Attributes:
        configs: configurations of the real-size base model's components.
        load_arguments: without the safety checker, which would paint training samples black.
        text_per_frame: whether the UNet wants the prompt once for every frame.
    """

    name: str = "sd15"
    network_class: str = "UNet2DConditionModel"
    codec: Codec = Images(shifted=False)
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: CONFIGS)
    load_arguments: Mapping[str, Any] = field(
        default_factory=lambda: {"safety_checker": None, "requires_safety_checker": False}
    )
    text_per_frame: bool = False
    network_name: str = "unet"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    optional_encoders: tuple[str, ...] = ()

    token_order: ClassVar[tuple[str, ...]] = ("tokenizer",)
    clip_layer: ClassVar[int] = -1
    """The encoder's last hidden states, normed."""

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """1: the UNet pads what its levels cannot halve."""
        return 1

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return the first tokenizer and its full length."""
        return "tokenizer", int(pipeline.tokenizer.model_max_length)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 768) in float32: the text encoder's last hidden states."""
        states, _ = encoded_by_pipeline(pipeline, prompts, do_classifier_free_guidance=False, **_ONE)
        return {"encoder_hidden_states": states.float()}

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt, (n, tokens, 768) in float32."""
        _, states = encoded_by_pipeline(pipeline, [""], do_classifier_free_guidance=True, **_ONE)
        return rows({"encoder_hidden_states": states.float()}, n)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the UNet's raw prediction, shaped like ``x_t``."""
        states = cond["encoder_hidden_states"].to(x_t.dtype)
        if self.text_per_frame:
            states = states.repeat_interleave(x_t.shape[2], dim=0)
        prediction: Tensor = network(x_t, model_time, encoder_hidden_states=states, return_dict=False)[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        unet, tokens = configs["unet"], configs["text_encoder"]["max_position_embeddings"]
        return {"encoder_hidden_states": (tokens, unet["cross_attention_dim"])}


SD15 = StableDiffusion1()
