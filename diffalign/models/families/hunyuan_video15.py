"""HunyuanVideo 1.5 (Tencent 2025, arXiv 2511.18870), text to video: Qwen2.5-VL reads the prompt and a ByT5
what stands in quotation marks in it, a transformer of two streams over latents of 16 x 16 pixels and 4
frames, rectified flow.

The network takes 65 channels: 32 of the latents, 32 of an image's and a mask, which are zeros here, as the
stock pipeline has them without an image. Of an image's states it is given none; the pipeline gives 729 of
zeros, which the network masks. Guidance is that of the pipeline's ``guider``, classifier-free.

Diffusers has no LoRA loader for this pipeline: a LoRA is saved as peft saves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Videos
from diffalign.models.families.base import bare, encoded_by_pipeline
from diffalign.models.families.flow import SpacedEvenly, masked_shapes
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.qwen_image import CONFIGS as QWEN_CONFIGS
from diffalign.types import Cond

GLYPHS = 256  # tokens of ByT5

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # 480p_t2v: the defaults of HunyuanVideo15Transformer3DModel
        "in_channels": 65,
        "out_channels": 32,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "num_layers": 54,
        "num_refiner_layers": 2,
        "patch_size": 1,
        "patch_size_t": 1,
        "text_embed_dim": 3584,
        "text_embed_2_dim": 1472,
        "image_embed_dim": 1152,
        "rope_axes_dim": (16, 56, 56),
    },
    "vae": {
        "_class_name": "AutoencoderKLHunyuanVideo15",
        "latent_channels": 32,
        "spatial_compression_ratio": 16,
        "temporal_compression_ratio": 4,
    },
    "text_encoder": {
        **QWEN_CONFIGS["text_encoder"]["text_config"],
        "architectures": ["Qwen2_5_VLTextModel"],
    },
    "text_encoder_2": {  # google/byt5-small with the tokens of Glyph-SDXL v2
        "architectures": ["T5EncoderModel"],
        "vocab_size": 1510,
        "d_model": 1472,
        "d_ff": 3584,
        "d_kv": 64,
        "num_heads": 6,
        "num_layers": 12,
        "feed_forward_proj": "gated-gelu",
    },
}


@dataclass(frozen=True)
class OneByOne(Videos):
    """A causal autoencoder whose attention takes one video at once, as diffusers masks it."""

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 F H W"]
    ) -> tuple[Float[Tensor, "B C f h w"], Float[Tensor, "B C f h w"]]:
        """(mean, std) of the posterior in the network's scale."""
        mean, std = zip(*(super(OneByOne, self).encode(vae, one) for one in pixels.split(1)), strict=True)
        return torch.cat(mean), torch.cat(std)

    def decode(self, vae: Any, latents: Float[Tensor, "B C f h w"]) -> Float[Tensor, "B 3 F H W"]:
        """Pixels in [0, 1]."""
        return torch.cat([super(OneByOne, self).decode(vae, one) for one in latents.split(1)])


@dataclass(frozen=True)
class HunyuanVideo15(SpacedEvenly, MaxSequenceLength):
    """The family ``hunyuan_video15``.

    Attributes:
        max_sequence_length: tokens of Qwen behind the system message, those of the template among them.
    """

    max_sequence_length: int = 1000
    name: str = "hunyuan_video15"
    network_name: str = "transformer"
    network_class: str = "HunyuanVideo15Transformer3DModel"
    codec: Codec = OneByOne(
        width=lambda config: int(config["latent_channels"]),
        space=lambda config: int(config["spatial_compression_ratio"]),
        stride=lambda config: int(config["temporal_compression_ratio"]),
    )
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    most_tokens: ClassVar[int | None] = 1000
    idle: ClassVar[tuple[str, ...]] = ("image_embedder",)

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of HunyuanVideo 1.5's components."""
        return CONFIGS

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """``out_channels``; the network takes more."""
        return int(network_config["out_channels"])

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Qwen's tokenizer; the tokens that its template leaves to the prompt."""
        messages = [
            {"role": "system", "content": pipeline.system_message},
            {"role": "user", "content": ""},
        ]
        text = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        around = len(pipeline.tokenizer(text).input_ids) - pipeline.prompt_template_encode_start_idx
        return "tokenizer", self.max_sequence_length - around

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3584) of Qwen and ``encoder_hidden_states_2`` (B, 256, 1472)
        of ByT5, with their masks, float32; the latter are zeros of a prompt without quotation marks.
        """
        states, mask, glyphs, glyph_mask = encoded_by_pipeline(pipeline, prompts, batch_size=len(prompts))
        kept = self.max_sequence_length  # a causal encoder: what is cut off changes nothing before it
        return {
            "encoder_hidden_states": states[:, :kept].float(),
            "encoder_attention_mask": mask[:, :kept].float(),
            "encoder_hidden_states_2": glyphs.float(),
            "encoder_attention_mask_2": glyph_mask.float(),
        }

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w)."""
        config = bare(network).config
        filled = config.in_channels - x_t.shape[1]
        embeddings = {name: cond[name].to(x_t.dtype) for name in cond if name.startswith("encoder_")}
        x = torch.cat([x_t, x_t.new_zeros(len(x_t), filled, *x_t.shape[2:])], dim=1)
        if x_t.is_meta:
            return _without_values(bare(network), x, model_time, embeddings)
        prediction: Tensor = network(
            hidden_states=x,
            timestep=model_time.to(x_t.dtype),
            image_embeds=x_t.new_zeros(len(x_t), 0, config.image_embed_dim),
            return_dict=False,
            **embeddings,
        )[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        network = configs["transformer"]
        glyphs = masked_shapes(GLYPHS, network["text_embed_2_dim"])
        return masked_shapes(self.max_sequence_length, network["text_embed_dim"]) | {
            f"{name}_2": shape for name, shape in glyphs.items()
        }


def _without_values(network: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Return the prediction's shape on the meta device, where there are no values to sort tokens by: all are
    kept.
    """
    time, rope = time.to(x.dtype), network.rope(x)
    mask = torch.cat([cond["encoder_attention_mask_2"], cond["encoder_attention_mask"]], dim=1).bool()
    temb, hidden = network.time_embed(time), network.x_embedder(x)
    states = network.context_embedder(cond["encoder_hidden_states"], time, cond["encoder_attention_mask"])
    text = torch.cat([network.context_embedder_2(cond["encoder_hidden_states_2"]), states], dim=1)
    recomputed = torch.is_grad_enabled() and network.gradient_checkpointing
    for block in network.transformer_blocks:
        given = (hidden, text, temb, mask, rope)
        hidden, text = network._gradient_checkpointing_func(block, *given) if recomputed else block(*given)
    prediction: Tensor = network.proj_out(network.norm_out(hidden, temb))
    video: Tensor = prediction.transpose(1, 2).unflatten(2, x.shape[2:])
    return video


HUNYUAN_VIDEO15 = HunyuanVideo15()
