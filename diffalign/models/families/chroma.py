"""Chroma1 (lodestones 2025): FLUX.1 schnell without its modulations, which one small network makes of the
time; a T5 alone reads the prompt, rectified flow, classifier-free guidance.

Latents are packed as FLUX's. Attention is told which of T5's tokens belong to the prompt and one more, the
first of the padding. diffusers' pipeline hands that mask on as numbers, which its attention adds: the other
padding is not left out, its weights are e times smaller. So does ``call``, to draw what the pipeline draws.

diffusers' own gradient checkpointing leaves the mask out of the single blocks: see
``diffalign.models.gradient_checkpointing``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.flow import Packed, masked, masked_shapes
from diffalign.models.families.flux import CONFIGS as FLUX_CONFIGS
from diffalign.models.families.flux import pack, places, unpack
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # the defaults of ChromaTransformer2DModel
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "axes_dims_rope": (16, 56, 56),
        "approximator_num_channels": 64,
        "approximator_hidden_dim": 5120,
        "approximator_layers": 5,
    },
    "vae": FLUX_CONFIGS["vae"],
    "text_encoder": FLUX_CONFIGS["text_encoder_2"],
}


@dataclass(frozen=True)
class Chroma(Packed, MaxSequenceLength):
    """The family ``chroma``.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    name: str = "chroma"
    network_name: str = "transformer"
    network_class: str = "ChromaTransformer2DModel"
    codec: Codec = Images()

    most_tokens: ClassVar[int | None] = 512

    masks_attention: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Chroma1's components."""
        return CONFIGS

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T5's tokens, 4096) and ``encoder_attention_mask`` (B, T5's tokens), 1
        up to the first token behind the prompt's end, float32.
        """
        states, _, mask, *_ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        return masked(states, mask)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        text, packed = cond["encoder_hidden_states"].to(x_t.dtype), pack(x_t)
        prediction: Tensor = network(
            hidden_states=packed,
            timestep=model_time / 1000,
            encoder_hidden_states=text,
            img_ids=places(x_t),
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            attention_mask=torch.cat(
                [cond["encoder_attention_mask"].to(x_t.dtype), packed.new_ones(packed.shape[:2])], dim=1
            ),
            return_dict=False,
        )[0]
        return unpack(prediction, x_t.shape[-2:])

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        return masked_shapes(self.max_sequence_length, configs["transformer"]["joint_attention_dim"])


CHROMA = Chroma()
