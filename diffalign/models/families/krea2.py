"""Krea 2 (Krea 2026): twelve layers of a Qwen3-VL read the prompt, one stream of text and packed image
tokens, rectified flow over the latents of Qwen-Image's autoencoder.

The states of the twelve layers go into the network as they are, which mixes them itself: a cached prompt is
twelve times as large as elsewhere, and ``model.max_sequence_length`` (512, of which 5 are the template's end)
is worth lowering: tokens behind a prompt's end are masked and have no places, so that their number changes
nothing.

The stock pipeline's ``guidance_scale`` s stands for pos + s (pos - neg): ours is 1 + s. The few-step
model (``is_distilled``) has a fixed shift, which its pipeline puts in the scheduler's stead; ``settle`` does
so too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec
from diffalign.models.families.chat import ReadByChat
from diffalign.models.families.flow import Packed, masked, masked_shapes
from diffalign.models.families.flux import pack, places, unpack
from diffalign.models.families.qwen_image import CONFIGS as QWEN_CONFIGS
from diffalign.models.still_codec import Stills
from diffalign.types import Cond

DISTILLED_MU = 1.15

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # the defaults of Krea2Transformer2DModel
        "in_channels": 64,
        "num_layers": 28,
        "attention_head_dim": 128,
        "num_attention_heads": 48,
        "num_key_value_heads": 12,
        "intermediate_size": 16384,
        "text_hidden_dim": 2560,
        "num_text_layers": 12,
        "text_num_attention_heads": 20,
        "text_num_key_value_heads": 20,
        "text_intermediate_size": 6912,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": (32, 48, 48),
    },
    "vae": QWEN_CONFIGS["vae"],
    "text_encoder": {  # Qwen/Qwen3-VL-4B-Instruct
        "architectures": ["Qwen3VLModel"],
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "deepstack_visual_indexes": (5, 11, 17),
        },
    },
}


@dataclass(frozen=True)
class Krea2(Packed, ReadByChat):
    """The family ``krea2``.

    Attributes:
        max_sequence_length: tokens of the prompt and of the template behind it.
    """

    name: str = "krea2"
    network_name: str = "transformer"
    network_class: str = "Krea2Transformer2DModel"
    codec: Codec = Stills()

    masks_attention: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Krea 2's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Qwen's tokenizer; the tokens that the template behind the prompt leaves to it."""
        return "tokenizer", self.max_sequence_length - pipeline.prompt_template_encode_num_suffix_tokens

    def settle(self, pipeline: Any) -> None:
        """Give the few-step model's scheduler the shift that its pipeline samples with."""
        if pipeline.config.is_distilled:
            config, line = pipeline.scheduler.config, {"base_shift": DISTILLED_MU, "max_shift": DISTILLED_MU}
            pipeline.scheduler = type(pipeline.scheduler).from_config(config, **line)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 12, 2560) and ``encoder_attention_mask`` (B, tokens), 1 at
        the prompt and the template's end, float32.
        """
        states, mask = self.encoded(pipeline, prompts)
        return masked(states, mask)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        text, image = cond["encoder_hidden_states"].to(x_t.dtype), places(x_t)
        prediction: Tensor = network(
            hidden_states=pack(x_t),
            timestep=model_time / 1000,
            encoder_hidden_states=text,
            position_ids=torch.cat([image.new_zeros(text.shape[1], 3), image]),
            encoder_attention_mask=cond["encoder_attention_mask"].bool(),
            return_dict=False,
        )[0]
        return unpack(prediction, x_t.shape[-2:])

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        network = configs["transformer"]
        layers, width = network["num_text_layers"], network["text_hidden_dim"]
        return masked_shapes(self.max_sequence_length, layers, width)


KREA2 = Krea2()
