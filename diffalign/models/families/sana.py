"""SANA and SANA 1.5 (Xie et al. 2024 and 2025, arXiv 2410.10629, 2501.18427): Gemma 2 reads the prompt behind
an instruction, a transformer of linear attention over latents of 32 x 32 pixels, rectified flow.

The instruction is the default of the stock pipeline's ``complex_human_instruction``; of its tokens and the
prompt's, the first and the last ``model.max_sequence_length`` - 1 are kept. The negative prompt stands
without it. Prompts are put in lower case, as the pipeline does it.

Its scheduler is a DPM-Solver of flow sigmas, so the network takes whole numbers, times its own
``timestep_scale``.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import bare, flow_grid, rows
from diffalign.models.families.flow import masked, masked_shapes
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.types import Cond

GEMMA2_2B = {
    "architectures": ["Gemma2Model"],
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}
"""google/gemma-2-2b."""

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # Sana_1600M_1024px: the defaults of SanaTransformer2DModel
        "in_channels": 32,
        "out_channels": 32,
        "num_attention_heads": 70,
        "attention_head_dim": 32,
        "num_layers": 20,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "sample_size": 32,
        "patch_size": 1,
    },
    "vae": {  # mit-han-lab/dc-ae-f32c32-sana-1.1: what differs from AutoencoderDC's defaults
        "_class_name": "AutoencoderDC",
        "latent_channels": 32,
        "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
        "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
        "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
        "upsample_block_type": "interpolate",
        "downsample_block_type": "conv",
        "scaling_factor": 0.41407,
    },
    "text_encoder": GEMMA2_2B,
}

SMALL: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_attention_heads": 36,
        "num_layers": 28,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
}
"""What differs in Sana_600M."""


@dataclass(frozen=True)
class DeepImages(Images):
    """``AutoencoderDC``: an image is an image, and encoding draws nothing."""

    def downscale(self, config: Mapping[str, Any]) -> int:
        """2 per level of the encoder below the first."""
        return int(2 ** (len(config["encoder_block_out_channels"]) - 1))

    def encode(
        self, vae: Any, pixels: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
        """(latents in the network's scale, zeros): there is no posterior to draw from."""
        latents: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent.float()
        return latents * vae.config.scaling_factor, torch.zeros_like(latents)


@dataclass(frozen=True)
class Sana(MaxSequenceLength):
    """The family ``sana``.

    Attributes:
        max_sequence_length: tokens of Gemma that the network sees.
    """

    max_sequence_length: int = 300
    name: str = "sana"
    network_name: str = "transformer"
    network_class: str = "SanaTransformer2DModel"
    codec: Codec = DeepImages()

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Sana_1600M_1024px's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Gemma's tokenizer; a prompt and its first token may have one less than all."""
        return "tokenizer", self.max_sequence_length - 1

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """As the scheduler makes it."""
        return flow_grid(scheduler, steps, shape[-2] * shape[-1])

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 2304) and ``encoder_attention_mask`` (B, tokens), 1 at the
        tokens before the padding, float32.
        """
        instruction = (
            inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        )
        return masked(
            *self.encoded(
                pipeline,
                prompts,
                do_classifier_free_guidance=False,
                complex_human_instruction=instruction,
            )[:2]
        )

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt, without the instruction."""
        return rows(masked(*self.encoded(pipeline, [""], do_classifier_free_guidance=True)[2:]), n)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        prediction: Tensor = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            timestep=model_time * bare(network).config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        return masked_shapes(self.max_sequence_length, configs["transformer"]["caption_channels"])


SANA = Sana()
