"""PixArt-Sigma (Chen et al. 2024, arXiv 2403.04692) and PixArt-alpha (Chen et al. 2023, arXiv 2310.00426): a
T5 alone reads the prompt, a transformer with cross-attention predicts noise, variance-preserving with a
linear schedule.

Of the network's 8 output channels the first 4 are the noise; the others, a learned variance that no sampler
in use reads, are left out. Tokens beyond the prompt's end are masked. Captions are cleaned as the stock
pipelines clean them when they are called: lower case, and with ftfy and beautifulsoup4 installed also
without markup, links and the like.

The two differ in the number of tokens, in the autoencoder, and in the further conditions of the 1024 pixel
model of alpha: height and width, and their ratio. They stay float32: bfloat16 has no 1023.

Diffusers has no LoRA loader for these pipelines and no single-file one: a LoRA is saved as peft saves it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.models.families.sdxl import CONFIGS as SDXL_CONFIGS
from diffalign.models.precision import only_errors
from diffalign.types import Cond

SIGMA_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # PixArt-Sigma-XL-2-1024-MS
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 28,
        "attention_head_dim": 72,
        "num_attention_heads": 16,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "use_additional_conditions": False,
    },
    "vae": SDXL_CONFIGS["vae"],
    "text_encoder": SD3_CONFIGS["text_encoder_3"],
}

ALPHA_CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {**SIGMA_CONFIGS["transformer"], "use_additional_conditions": True},  # PixArt-XL-2-1024-MS
    "vae": {**SDXL_CONFIGS["vae"], "scaling_factor": 0.18215},
    "text_encoder": SD3_CONFIGS["text_encoder_3"],
}

UNTOLD: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **ALPHA_CONFIGS["transformer"],
        "sample_size": 64,
        "use_additional_conditions": False,
    },
}
"""What differs in alpha's models of 512 pixels and fewer."""


@dataclass(frozen=True)
class PixArt(MaxSequenceLength):
    """The families ``pixart`` and ``pixart_alpha``.

    Attributes:
        max_sequence_length: tokens of T5.
        size_conditions: whether the network may take sizes as conditions; one that does not ignores them.
        configs: configurations of the real-size base model's components.
    """

    max_sequence_length: int = 300
    size_conditions: bool = False
    name: str = "pixart"
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: SIGMA_CONFIGS)
    network_name: str = "transformer"
    network_class: str = "PixArtTransformer2DModel"
    codec: Codec = Images(shifted=False)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 4096) and ``encoder_attention_mask`` (B, tokens), 1 up to the
        prompt's end and 0 behind it, float32.
        """
        # diffusers warns at each call where beautifulsoup4 is absent
        with only_errors("diffusers"):
            states, mask, _, _ = self.encoded(
                pipeline, prompts, do_classifier_free_guidance=False, clean_caption=True
            )
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask.float()}

    def micro_conditions(
        self,
        original_size: Float[Tensor, "B 2"],
        crop: Float[Tensor, "B 2"],
        target_size: Float[Tensor, "B 2"],
    ) -> dict[str, Tensor]:
        """``resolution`` (B, 2), height and width of the image, and ``aspect_ratio`` (B, 1), the one over the
        other; none of them in Sigma.
        """
        if not self.size_conditions:
            return {}
        ratio = target_size[:, :1] / target_size[:, 1:]
        return {"resolution": target_size.float(), "aspect_ratio": ratio.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's prediction of the noise, (B, C, h, w)."""
        prediction: Tensor = network(
            x_t,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"].to(x_t.dtype),
            timestep=model_time,
            added_cond_kwargs={name: cond.get(name) for name in ("resolution", "aspect_ratio")},
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        tokens = self.max_sequence_length
        shapes: dict[str, tuple[int, ...]] = {
            "encoder_hidden_states": (tokens, configs["transformer"]["caption_channels"]),
            "encoder_attention_mask": (tokens,),
        }
        return shapes | ({"resolution": (2,), "aspect_ratio": (1,)} if self.size_conditions else {})


PIXART = PixArt()
PIXART_ALPHA = PixArt(
    max_sequence_length=120, size_conditions=True, name="pixart_alpha", configs=ALPHA_CONFIGS
)
