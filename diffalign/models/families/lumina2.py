"""Lumina-Image 2.0 (Qin et al. 2025, arXiv 2503.21758): Gemma 2 reads the prompt behind a system prompt, one
stream of text and image tokens, rectified flow.

The network counts time from noise to data, it takes 1 - t, and predicts the velocity in that direction;
``call`` turns its sign. The negative prompt stands without the system prompt, and the stock pipeline
(``cfg_normalization``) gives each row of latents of the guided prediction the length of the prompt's own:
``keeps_length``.

Where the scheduler's shift is dynamic, the stock pipeline takes the number of channels for that of tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import rows
from diffalign.models.families.flow import SpacedEvenly, masked, masked_shapes
from diffalign.models.families.flux import CONFIGS as FLUX_CONFIGS
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sana import GEMMA2_2B
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # the defaults of Lumina2Transformer2DModel, but for the width of the text
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "hidden_size": 2304,
        "num_layers": 26,
        "num_refiner_layers": 2,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "axes_dim_rope": (32, 32, 32),
        "axes_lens": (300, 512, 512),
        "cap_feat_dim": 2304,
    },
    "vae": FLUX_CONFIGS["vae"],
    "text_encoder": GEMMA2_2B,
}


@dataclass(frozen=True)
class Lumina2(SpacedEvenly, MaxSequenceLength):
    """The family ``lumina2``.

    Attributes:
        max_sequence_length: tokens of Gemma, those of the system prompt among them.
    """

    max_sequence_length: int = 256
    name: str = "lumina2"
    network_name: str = "transformer"
    network_class: str = "Lumina2Transformer2DModel"
    codec: Codec = Images()

    keeps_length: ClassVar[Literal["token", "row"] | None] = "row"

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Lumina-Image 2.0's components."""
        return CONFIGS

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Gemma's tokenizer; the tokens that the system prompt leaves to the prompt."""
        before = pipeline.tokenizer(pipeline.system_prompt + " <Prompt Start> ").input_ids
        return "tokenizer", self.max_sequence_length - len(before) + 1

    def shifting_tokens(self, network_config: Mapping[str, Any], shape: tuple[int, ...]) -> int:
        """Return the number of channels, see the module's docstring."""
        return shape[0]

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 2304), Gemma's last but one, and ``encoder_attention_mask``
        (B, tokens), 1 up to the prompt's end and 0 behind it, float32.
        """
        return masked(*self.encoded(pipeline, prompts, do_classifier_free_guidance=False)[:2])

    def negative(self, pipeline: Any, n: int) -> dict[str, Tensor]:
        """Return the encoded empty prompt, without the system prompt."""
        return rows(masked(*self.encoded(pipeline, [""], do_classifier_free_guidance=True)[2:]), n)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's prediction of eps - x0, (B, C, h, w)."""
        prediction: Tensor = network(
            hidden_states=x_t,
            timestep=1 - model_time / 1000,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=_counted(cond["encoder_attention_mask"].long()),
            return_dict=False,
        )[0]
        return -prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        return masked_shapes(self.max_sequence_length, configs["transformer"]["cap_feat_dim"])


class _Whole(Tensor):
    """A mask on the meta device: the network asks for its sums, and there are no values."""

    def sum(self, *_: Any, **__: Any) -> Tensor:
        """Return the number of all tokens, (B,), on the CPU."""
        return torch.full(self.shape[:1], self.shape[1])


def _counted(mask: Tensor) -> Tensor:
    return mask.as_subclass(_Whole) if mask.is_meta else mask


LUMINA2 = Lumina2()
