"""CogVideoX (Yang et al. 2024, arXiv 2408.06072): T5, a transformer that attends over text and video
together, v-prediction on a shifted schedule whose last step is pure noise.

The 2B model adds sine positions to its tokens; the 5B models turn queries and keys, by angles that the
pipeline makes of the video's size and hands to the network: ``call`` makes them of the latents' size. The
transformer wants frames before channels. Patches of 1.5 are two latent frames deep: ``codecs.Videos`` puts a
copy of the first one before it. The autoencoder makes 1 + 4 k frames only of an odd number of latent frames,
so videos have 1 + 8 k frames: 49 of the 2B and 5B models, 81 of 1.5.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Videos
from diffalign.models.families.base import bare
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # CogVideoX-2b
        "num_attention_heads": 30,
        "attention_head_dim": 64,
        "in_channels": 16,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "num_layers": 30,
        "sample_width": 90,
        "sample_height": 60,
        "patch_size": 2,
    },
    "vae": {
        "_class_name": "AutoencoderKLCogVideoX",
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "block_out_channels": (128, 256, 256, 512),
        "latent_channels": 16,
        "temporal_compression_ratio": 4,
        "scaling_factor": 1.15258426,
    },
    "text_encoder": SD3_CONFIGS["text_encoder_3"],
}

LARGE: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    "vae": {**CONFIGS["vae"], "scaling_factor": 0.7},
}
"""What differs in CogVideoX-5b."""


@dataclass(frozen=True)
class CogVideoX(MaxSequenceLength):
    """The family ``cogvideox``.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    max_sequence_length: int = 226
    name: str = "cogvideox"
    network_name: str = "transformer"
    network_class: str = "CogVideoXTransformer3DModel"
    codec: Codec = Videos(
        width=lambda config: int(config["latent_channels"]),
        space=lambda config: int(2 ** (len(config["block_out_channels"]) - 1)),
        stride=lambda config: int(config["temporal_compression_ratio"]),
        step=lambda config: 2 * int(config["temporal_compression_ratio"]),
        depth=lambda network_config: int(network_config.get("patch_size_t") or 1),
    )

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of CogVideoX-2b's components."""
        return CONFIGS

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T5's tokens, 4096) in float32, padding included."""
        states, _ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w)."""
        config = bare(network).config
        prediction: Tensor = network(
            hidden_states=x_t.transpose(1, 2),
            timestep=model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            image_rotary_emb=rotary(config, x_t) if config.use_rotary_positional_embeddings else None,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        return {"encoder_hidden_states": (self.max_sequence_length, configs["transformer"]["text_embed_dim"])}


def rotary(config: Any, x_t: Float[Tensor, "B C F h w"]) -> tuple[Tensor, Tensor]:
    """(cosines, sines), each (tokens, head width) float32, of latents of this size, as the pipeline's."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, patch, depth = x_t.shape[2], config.patch_size, config.patch_size_t
    size = (x_t.shape[3] // patch, x_t.shape[4] // patch)
    base_height, base_width = config.sample_height // patch, config.sample_width // patch
    if depth is None:  # 1.0: the base model's angles stretched over the video
        region = get_resize_crop_region_for_grid(size, base_width, base_height)
        how: dict[str, Any] = {"crops_coords": region, "temporal_size": frames}
    else:  # 1.5: the upper left of the base model's angles
        how = {
            "crops_coords": None,
            "temporal_size": -(-frames // depth),
            "grid_type": "slice",
            "max_size": (base_height, base_width),
        }
    cosines, sines = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim, grid_size=size, device=x_t.device, **how
    )
    return cosines, sines


COGVIDEOX = CogVideoX()
