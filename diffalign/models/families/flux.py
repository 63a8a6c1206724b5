"""FLUX.1 (Black Forest Labs 2024): a CLIP text encoder for one vector and a T5 for the tokens, a transformer
over packed latents, rectified flow with a shift that grows with the image.

The network sees no latents (B, 16, h, w) but 2 x 2 of them in a row, (B, h w / 4, 64), beside the places of
the rows; ``call`` packs and unpacks, so that latents have their shape everywhere else. It takes t, not
1000 t.

There is no classifier-free guidance as in other families: dev has been distilled to give a guided prediction
in one call, and takes its strength as a condition (``model.embedded_guidance``, 3.5 in the stock pipeline);
schnell has none of it. So a guidance of 1 (``rollout.guidance``, a noising's) is the published way of
sampling, and more than 1 is what the pipeline calls ``true_cfg_scale`` with an empty negative prompt, on top
of what is embedded and for twice the calls. The ``guidance_scale`` of the stock pipeline is the embedded
one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.config.schema import ModelConfig
from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import bare
from diffalign.models.families.flow import SIDE, Packed
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.models.families.sources import SOURCE
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # FLUX.1-dev
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "vae": {**SD3_CONFIGS["vae"], "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "text_encoder": {**SD3_CONFIGS["text_encoder"], "architectures": ["CLIPTextModel"]},
    "text_encoder_2": SD3_CONFIGS["text_encoder_3"],
}

SCHNELL: Mapping[str, Mapping[str, Any]] = {
    "transformer": {**CONFIGS["transformer"], "guidance_embeds": False},
}
"""What differs in FLUX.1-schnell."""


@dataclass(frozen=True)
class Flux(Packed, MaxSequenceLength):
    """The family ``flux``.

    Attributes:
        max_sequence_length: tokens of T5.
        embedded_guidance: the guidance that a network with a guidance embedding takes.
    """

    max_sequence_length: int = 512
    embedded_guidance: float = 3.5
    name: str = "flux"
    network_name: str = "transformer"
    network_class: str = "FluxTransformer2DModel"
    codec: Codec = Images()
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    token_order: ClassVar[tuple[str, ...]] = ("tokenizer_2",)
    most_tokens: ClassVar[int | None] = 512

    shares_tokens: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of FLUX.1-dev's components."""
        return CONFIGS

    def configured(self, config: ModelConfig) -> Self:
        """With the run's number of T5 tokens and its embedded guidance.

        Raises:
            UserError: more tokens than the pipeline reads.
        """
        guidance = self.embedded_guidance if config.embedded_guidance is None else config.embedded_guidance
        return replace(super().configured(config), embedded_guidance=guidance)

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """T5's tokenizer."""
        return "tokenizer_2", self.max_sequence_length

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T5's tokens, 4096) and ``pooled_projections`` (B, 768), float32."""
        states, pooled, _ = self.encoded(pipeline, prompts, prompt_2=None)
        return {"encoder_hidden_states": states.float(), "pooled_projections": pooled.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        guidance = None
        if bare(network).config.guidance_embeds:
            guidance = torch.full((len(x_t),), self.embedded_guidance, device=x_t.device)
        text, packed, ids = cond["encoder_hidden_states"].to(x_t.dtype), pack(x_t), places(x_t)
        tokens = packed.shape[1]
        if SOURCE in cond:  # of Kontext, behind the noisy image
            source = cond[SOURCE].to(x_t.dtype)
            packed, ids = torch.cat([packed, pack(source)], 1), torch.cat([ids, places(source, 1)])
        prediction: Tensor = network(
            hidden_states=packed,
            timestep=model_time / 1000,
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_projections"].to(x_t.dtype),
            img_ids=ids,
            txt_ids=torch.zeros(text.shape[1], 3, device=x_t.device),
            return_dict=False,
        )[0]
        return unpack(prediction[:, :tokens], x_t.shape[-2:])

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        network = configs["transformer"]
        return {
            "encoder_hidden_states": (self.max_sequence_length, network["joint_attention_dim"]),
            "pooled_projections": (network["pooled_projection_dim"],),
        }


def pack(latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
    """2 x 2 latents in a row: (B, h w / 4, 4 C), rows of the image one after the other, channels first."""
    patches = latents.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # B C h/2 2 w/2 2
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(packed: Float[Tensor, "B N D"], size: tuple[int, ...]) -> Float[Tensor, "B C h w"]:
    """Undo ``pack`` for latents of ``size`` (h, w)."""
    height, width = size
    patches = packed.unflatten(2, (-1, SIDE, SIDE)).unflatten(1, (height // SIDE, width // SIDE))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def places(latents: Float[Tensor, "B C h w"], number: int = 0) -> Float[Tensor, "N 3"]:
    """Return the image's number, row and column of each patch, float32: bfloat16 cannot tell 257 from 256."""
    rows, columns = (torch.arange(side // SIDE, device=latents.device) for side in latents.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.full_like(row, number), row, column], dim=2).flatten(0, 1).float()


FLUX = Flux()
