"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): two CLIP text encoders and a T5, a
multi-modal transformer, rectified flow.

The context is CLIP's 77 tokens, padded with zeros to T5's width, then T5's. A pipeline without its T5
(``text_encoder_3``) has zeros there, as many as T5 would have had: the transformer attends to them, so their
number matters, and ``model.max_sequence_length`` sets it where it is not diffusers' own 256.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import flow_grid, rows
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.types import Cond

_CLIP_L = {  # openai/clip-vit-large-patch14, with its projection
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # stable-diffusion-3-medium
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "attention_head_dim": 64,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    "vae": {
        "sample_size": 1024,
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
        **_CLIP_L,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
    "text_encoder_3": {  # google/t5-v1_1-xxl
        "architectures": ["T5EncoderModel"],
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    },
}

MEDIUM_35: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "dual_attention_layers": tuple(range(13)),
    },
}
"""What differs in stable-diffusion-3.5-medium."""

LARGE_35: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "qk_norm": "rms_norm",
    },
}
"""What differs in stable-diffusion-3.5-large and its turbo."""


_OTHERS = {"prompt_2": None, "prompt_3": None}  # the prompt for all encoders


@dataclass(frozen=True)
class StableDiffusion3(MaxSequenceLength):
    """The family ``sd3``.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    max_sequence_length: int = 256
    name: str = "sd3"
    network_name: str = "transformer"
    network_class: str = "SD3Transformer2DModel"
    codec: Codec = Images()
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    optional_encoders: tuple[str, ...] = ("text_encoder_3",)

    token_order: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_3")
    most_tokens: ClassVar[int | None] = 512

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of stable-diffusion-3-medium's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """T5's tokenizer; the first of CLIP's where there is no T5."""
        if pipeline.text_encoder_3 is None:
            return "tokenizer", int(pipeline.tokenizer_max_length)
        return "tokenizer_3", self.max_sequence_length

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """As the scheduler makes it."""
        patch = self.patch(network_config)
        return flow_grid(scheduler, steps, (shape[-2] // patch) * (shape[-1] // patch))

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, 77 + T5's tokens, 4096) and ``pooled_projections`` (B, 2048),
        float32.
        """
        states, _, pooled, _ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False, **_OTHERS)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt."""
        _, states, _, pooled = self.encoded(pipeline, [""], do_classifier_free_guidance=True, **_OTHERS)
        return rows({"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}, n)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        prediction: Tensor = network(
            hidden_states=x_t,
            timestep=model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            pooled_projections=cond["pooled_projections"].to(x_t.dtype),
            return_dict=False,
        )[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        network = configs["transformer"]
        tokens = configs["text_encoder"]["max_position_embeddings"] + self.max_sequence_length
        return {
            "encoder_hidden_states": (tokens, network["joint_attention_dim"]),
            "pooled_projections": (network["pooled_projection_dim"],),
        }


SD3 = StableDiffusion3()
