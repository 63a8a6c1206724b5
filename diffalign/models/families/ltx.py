"""LTX-Video 0.9 (HaCohen et al. 2024, arXiv 2501.00103): T5, a transformer over packed latents of an
autoencoder of 32 x 32 pixels and 8 frames, rectified flow with a shift that grows with the video.

The network sees latents (B, 128, F, h, w) as a row of tokens (B, F h w, 128) and takes F, h and w; ``call``
packs and unpacks. Its positions are in pixels and seconds, so it takes a frame rate as well: the 25 of the
stock pipeline, whatever the data were filmed at. Of T5's tokens those beyond the prompt's end are masked.

The mean and scale of its latents are buffers of the autoencoder, not of its configuration. Decoders of 0.9.1
and later take a time; the stock pipeline's default is 0, and no noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Videos
from diffalign.models.families.base import flow_grid
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.types import Cond

FRAME_RATE = 25
PIXELS, FRAMES = 32, 8  # of a latent of the one autoencoder that LTX-Video has

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # LTX-Video 0.9
        "in_channels": 128,
        "out_channels": 128,
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "cross_attention_dim": 2048,
        "num_layers": 28,
        "caption_channels": 4096,
    },
    "vae": {
        "_class_name": "AutoencoderKLLTXVideo",
        "latent_channels": 128,
        "spatio_temporal_scaling": (True, True, True, False),
        "patch_size": 4,
        "patch_size_t": 1,
    },
    "text_encoder": SD3_CONFIGS["text_encoder_3"],
}


def moments(vae: Any) -> tuple[Tensor, Tensor]:
    """(shift, scale) from an autoencoder's own scale, by its buffers."""
    shape = (1, -1, 1, 1, 1)
    return vae.latents_mean.view(shape), vae.config.scaling_factor / vae.latents_std.view(shape)


def decoder_times(vae: Any, count: int) -> Tensor | None:
    """Zeros (count,) where the decoder takes times."""
    return torch.zeros(count) if vae.config.timestep_conditioning else None


def _halvings(config: Mapping[str, Any]) -> int:
    return int(2 ** sum(config["spatio_temporal_scaling"]))


@dataclass(frozen=True)
class LTXVideo(MaxSequenceLength):
    """The family ``ltx``.

    Attributes:
        max_sequence_length: tokens of T5.
    """

    max_sequence_length: int = 128
    name: str = "ltx"
    network_name: str = "transformer"
    network_class: str = "LTXVideoTransformer3DModel"
    codec: Codec = Videos(
        width=lambda config: int(config["latent_channels"]),
        space=lambda config: int(
            config.get("spatial_compression_ratio") or config["patch_size"] * _halvings(config)
        ),
        stride=lambda config: int(
            config.get("temporal_compression_ratio") or config["patch_size_t"] * _halvings(config)
        ),
        moments=moments,
        times=decoder_times,
    )

    masks_attention: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of LTX-Video 0.9's components."""
        return CONFIGS

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Evenly spaced from 1 to 1 / steps, then shifted by the scheduler."""
        return flow_grid(scheduler, steps, shape[-3] * shape[-2] * shape[-1], own_sigmas=True)

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, T5's tokens, 4096) and ``encoder_attention_mask`` (B, T5's tokens), 1
        at the prompt's own, float32.
        """
        states, mask, _, _ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w)."""
        frames, height, width = x_t.shape[2:]
        prediction: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_attention_mask=cond["encoder_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(FRAMES / FRAME_RATE, PIXELS, PIXELS),
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2).unflatten(2, (frames, height, width))

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        tokens = self.max_sequence_length
        return {
            "encoder_hidden_states": (tokens, configs["transformer"]["caption_channels"]),
            "encoder_attention_mask": (tokens,),
        }


LTX = LTXVideo()
