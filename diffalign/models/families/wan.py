"""Wan 2.1 and 2.2, text to video (Wan team 2025, arXiv 2503.20314): UMT5, a transformer over latents of a
causal autoencoder of videos, rectified flow.

UMT5's states beyond a prompt's end are zeros, and the transformer attends to them: their number matters
(``model.max_sequence_length``, 512 as the pipeline's default). The pipeline of the 5B model of 2.2 tells
every token its own time (``expand_timesteps``), so that an image can be given as a first frame; without one
all times are equal, so the network takes one here, which is the same and makes its time embedding once.

The A14B of 2.2 is two transformers (``models/experts.py``): ``transformer`` from the time
``boundary_ratio`` of the pipeline's configuration on, ``transformer_2`` below it. ``model.expert`` says which
one is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.config.schema import ModelConfig
from diffalign.models.codecs import Codec, Videos
from diffalign.models.experts import EXPERTS, FIRST
from diffalign.models.families.base import flow_grid
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # Wan2.1-T2V-1.3B
        "patch_size": (1, 2, 2),
        "num_attention_heads": 12,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "ffn_dim": 8960,
        "num_layers": 30,
    },
    "vae": {
        "_class_name": "AutoencoderKLWan",
        "z_dim": 16,
        "scale_factor_spatial": 8,
        "scale_factor_temporal": 4,
    },
    "text_encoder": {  # google/umt5-xxl
        **SD3_CONFIGS["text_encoder_3"],
        "architectures": ["UMT5EncoderModel"],
        "vocab_size": 256384,
    },
}

LARGE: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_attention_heads": 40,
        "ffn_dim": 13824,
        "num_layers": 40,
    },
}
"""What differs in Wan2.1-T2V-14B, and in each expert of Wan2.2-T2V-A14B."""

TI2V: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_attention_heads": 24,
        "in_channels": 48,
        "out_channels": 48,
        "ffn_dim": 14336,
    },
    "vae": {
        **CONFIGS["vae"],
        "z_dim": 48,
        "base_dim": 160,
        "decoder_base_dim": 256,
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_spatial": 16,
    },
}
"""What differs in Wan2.2-TI2V-5B; the scale of its latents is in its checkpoint."""


@dataclass(frozen=True)
class WanVideo(MaxSequenceLength):
    """The family ``wan``.

    Attributes:
        max_sequence_length: tokens of UMT5.
        network_name: the transformer that is trained, of two where there are two.
    """

    max_sequence_length: int = 512
    name: str = "wan"
    network_name: str = FIRST
    network_class: str = "WanTransformer3DModel"
    codec: Codec = Videos(
        width=lambda config: int(config.get("z_dim", 16)),
        space=lambda config: int(config.get("scale_factor_spatial", 8)),
        stride=lambda config: int(config.get("scale_factor_temporal", 4)),
        exact=True,  # as diffusers' own examples load it
    )

    shares_tokens: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Wan2.1-T2V-1.3B's components."""
        return CONFIGS

    def configured(self, config: ModelConfig) -> Self:
        """With the run's number of tokens, and its expert."""
        return replace(super().configured(config), network_name=EXPERTS[config.expert or "high"])

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """Return the side of ``patch_size``, which is one latent frame deep."""
        return int(network_config["patch_size"][-1])

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """As the scheduler makes it: UniPC's with its ``flow_shift``, or Euler's with its ``shift``."""
        patch = self.patch(network_config)
        return flow_grid(scheduler, steps, shape[-3] * (shape[-2] // patch) * (shape[-1] // patch))

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, UMT5's tokens, 4096) in float32, zeros after a prompt's end."""
        states, _ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w)."""
        prediction: Tensor = network(
            hidden_states=x_t,
            timestep=model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            return_dict=False,
        )[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        return {"encoder_hidden_states": (self.max_sequence_length, configs[self.network_name]["text_dim"])}


WAN = WanVideo()
