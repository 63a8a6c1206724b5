"""Qwen-Image (Qwen team 2025, arXiv 2508.02324) and its 2512: Qwen2.5-VL reads the prompt, a transformer of
two streams over packed latents, rectified flow.

The network sees 2 x 2 latents in a row, as FLUX's does; ``call`` packs and unpacks. It takes t, not 1000 t.
Guidance is classifier-free, and the stock pipeline (``true_cfg_scale``, with a negative prompt) then gives
the guided prediction of each token the length of the prompt's own: ``keeps_length``.

The template around a prompt is the pipeline's own; it drops the states of its first 34 tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec
from diffalign.models.families.chat import ReadByChat, lengths_of, padded, text_multiple
from diffalign.models.families.flow import SIDE, Packed
from diffalign.models.families.flux import pack, unpack
from diffalign.models.families.sources import SOURCE
from diffalign.models.still_codec import Stills
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {"_class_name": "AutoencoderKLQwenImage", "base_dim": 96, "z_dim": 16},
    "text_encoder": {  # Qwen/Qwen2.5-VL-7B-Instruct
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class QwenImage(Packed, ReadByChat):
    """The family ``qwen_image``.

    Attributes:
        max_sequence_length: tokens of the prompt, and of the template behind it.
    """

    name: str = "qwen_image"
    network_name: str = "transformer"
    network_class: str = "QwenImageTransformer2DModel"
    codec: Codec = Stills()

    most_tokens: ClassVar[int | None] = 1024
    keeps_length: ClassVar[Literal["token", "row"] | None] = "token"

    masks_attention: ClassVar[bool] = True
    shares_tokens: ClassVar[bool] = True
    cuts_prompts: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Qwen-Image's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Qwen2.5-VL's tokenizer; the tokens that the template behind the prompt leaves to it."""
        template = pipeline.tokenizer(pipeline.prompt_template_encode.format("")).input_ids
        behind = len(template) - pipeline.prompt_template_encode_start_idx
        return "tokenizer", self.max_sequence_length - behind

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3584) and ``encoder_attention_mask`` (B, tokens), 1 up to the
        prompt's end and 0 behind it, float32.
        """
        states, mask = self.encoded(pipeline, prompts)
        if mask is None:  # all are as long
            mask = torch.ones(states.shape[:2], device=states.device)
        rows = [one[: int(length)] for one, length in zip(states, mask.sum(1), strict=True)]
        full, mask = padded(rows, self.max_sequence_length)
        return {"encoder_hidden_states": full, "encoder_attention_mask": mask}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        mask, (height, width) = cond["encoder_attention_mask"], x_t.shape[-2:]
        lengths = lengths_of(mask)
        multiple = text_multiple(network)
        longest = math.ceil(max(lengths) / multiple) * multiple
        shown = [x_t, *([cond[SOURCE].to(x_t.dtype)] if SOURCE in cond else [])]
        packed = [pack(one) for one in shown]
        prediction: Tensor = network(
            hidden_states=torch.cat(packed, 1),
            timestep=model_time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"][:, :longest].to(x_t.dtype),
            encoder_hidden_states_mask=None if min(lengths) == longest else mask[:, :longest].bool(),
            img_shapes=[[(1, *(side // SIDE for side in one.shape[-2:])) for one in shown]] * len(x_t),
            return_dict=False,
        )[0]
        return unpack(prediction[:, : packed[0].shape[1]], (height, width))

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        width, tokens = configs["transformer"]["joint_attention_dim"], self.max_sequence_length
        return {"encoder_hidden_states": (tokens, width), "encoder_attention_mask": (tokens,)}


QWEN_IMAGE = QwenImage()
