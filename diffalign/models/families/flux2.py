"""FLUX.2 dev (Black Forest Labs 2025): three layers of Mistral Small 3 read the prompt; network, latents and
times are of FLUX.2 klein's kind.

Like FLUX.1 dev it has been distilled to give a guided prediction in one call, and takes its strength as a
condition (``model.embedded_guidance``, 4 in the stock pipeline, whose ``guidance_scale`` is the embedded
one). A guidance of 1 is therefore the published way of sampling; more than 1 guides away from the empty
prompt on top of that, for twice the calls.

The prompt stands in a chat template behind the pipeline's system message; padding included it has
``model.max_sequence_length`` tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffalign.config.schema import ModelConfig
from diffalign.models.families.base import bare
from diffalign.models.families.flux2_klein import CONFIGS as KLEIN_CONFIGS
from diffalign.models.families.flux2_klein import Flux2Klein
from diffalign.models.families.sources import SourceImages

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # the defaults of Flux2Transformer2DModel
        **KLEIN_CONFIGS["transformer"],
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "guidance_embeds": True,
    },
    "vae": KLEIN_CONFIGS["vae"],
    "text_encoder": {  # mistralai/Mistral-Small-3.2-24B-Instruct-2506
        "architectures": ["Mistral3ForConditionalGeneration"],
        "text_config": {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 32768,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "head_dim": 64,
            "patch_size": 14,
            "image_size": 1540,
        },
        "spatial_merge_size": 2,
        "multimodal_projector_bias": False,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class Flux2(Flux2Klein):
    """The family ``flux2``.

    Attributes:
        max_sequence_length: tokens of Mistral, those of its chat template among them.
        embedded_guidance: the guidance that a network with a guidance embedding takes.
    """

    name: str = "flux2"
    embedded_guidance: float = 4.0

    sources: ClassVar[SourceImages | None] = None

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of FLUX.2 dev's components."""
        return CONFIGS

    def configured(self, config: ModelConfig) -> Self:
        """With the run's number of tokens and its embedded guidance.

        Raises:
            UserError: more tokens than the pipeline reads.
        """
        guidance = self.embedded_guidance if config.embedded_guidance is None else config.embedded_guidance
        return replace(super().configured(config), embedded_guidance=guidance)

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Mistral's tokenizer; the tokens that its template and system message leave to the prompt."""
        parts = {"system": pipeline.system_message, "user": ""}
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()
        ]
        template = pipeline.tokenizer.apply_chat_template([messages], tokenize=True, return_dict=True)
        return "tokenizer", self.max_sequence_length - len(template["input_ids"][0])

    def guidance(self, network: nn.Module, x_t: Tensor) -> Tensor | None:
        """Return the embedded guidance (B,), float32, of a network that takes one."""
        if not bare(network).config.guidance_embeds:
            return None
        return torch.full((len(x_t),), self.embedded_guidance, device=x_t.device)


FLUX2 = Flux2()
