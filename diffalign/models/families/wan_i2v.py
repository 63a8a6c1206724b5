"""Wan 2.1 and 2.2 A14B, image to video (Wan team 2025, arXiv 2503.20314): Wan that is shown the first frame.

The network sees the noisy latents, a mask of the frames that are given (4 channels, the frames of a latent
one), and the latents of a video of the source followed by grey: 36 channels. That of 2.1 also attends to the
states of a CLIP vision tower before its last layer, and takes the first 512 tokens for the prompt's. Both are
made once a source. The A14B has two experts (``wan.py``) and no vision tower.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.models.codecs import Codec
from diffalign.models.families.sources import SOURCE, AsLatents, SourceImages, pictures
from diffalign.models.families.wan import CONFIGS as WAN_CONFIGS
from diffalign.models.families.wan import LARGE, WanVideo
from diffalign.types import Cond

STATES = "source_states"
"""The name of the condition that holds the vision tower's states, (B, tokens, width)."""

TOKENS = 512  # of the prompt, which the network of 2.1 counts on
FRAMES_TOLD = 4  # channels of the mask: the frames of one latent frame

CONFIGS: Mapping[str, Mapping[str, Any]] = {  # Wan2.1-I2V-14B-480P, and 720P
    **WAN_CONFIGS,
    "transformer": {
        **LARGE["transformer"],
        "in_channels": 36,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
    },
    "image_encoder": {  # OpenCLIP's ViT-H/14
        "architectures": ["CLIPVisionModel"],
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
}

A14B: Mapping[str, Mapping[str, Any] | None] = {
    "transformer": {**LARGE["transformer"], "in_channels": 36},
    "image_encoder": None,
}
"""What differs in each expert of Wan2.2-I2V-A14B, which has no vision tower."""


@dataclass(frozen=True)
class FirstFrame(AsLatents):
    """A source that is the first frame of the video."""

    needed: bool = True
    usual: bool = True

    def encode(
        self, pipeline: Any, codec: Codec, pixels: Float[Tensor, "B 3 H W"], frames: int
    ) -> dict[str, Tensor]:
        """``source`` (B, C, f, h, w), the latents of the source and grey; ``source_states`` of the tower."""
        grey = pixels.new_zeros(*pixels.shape[:2], frames - 1, *pixels.shape[2:])
        found = {SOURCE: codec.encode(pipeline.vae, torch.cat([pixels[:, :, None], grey], 2))[0]}
        if pipeline.image_encoder is None:
            return found
        levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        states = pipeline.encode_image(pictures(list(levels)), pipeline.image_encoder.device)
        return found | {STATES: states.float()}


@dataclass(frozen=True)
class WanImageToVideo(WanVideo):
    """The family ``wan_i2v``.

    Attributes:
        max_sequence_length: tokens of UMT5.
        network_name: the transformer that is trained, of two where there are two.
    """

    name: str = "wan_i2v"
    optional_encoders: tuple[str, ...] = ("image_encoder",)

    sources: ClassVar[SourceImages | None] = FirstFrame()

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Wan2.1-I2V-14B's components."""
        return CONFIGS

    def settle(self, pipeline: Any) -> None:
        """Refuse what is called in another way.

        Raises:
            UserError: a time for each token (the 5B of 2.2), or another number of tokens than the network of
                2.1 counts on.
        """
        if pipeline.config.get("expand_timesteps"):
            raise UserError(
                "model.path is an image-to-video pipeline of Wan2.2-TI2V-5B, whose first frame is marked by "
                "the times of its tokens; allowed: model.family wan_ti2v, or wan_i2v of 2.1 or A14B"
            )
        if pipeline.image_encoder is not None and self.max_sequence_length != TOKENS:
            raise UserError(
                f"model.max_sequence_length={self.max_sequence_length} with Wan 2.1 image to video; allowed: "
                f"{TOKENS}, which its network counts on, or null"
            )

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """``out_channels``: the network sees the mask and the source beside them."""
        return int(network_config["out_channels"])

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, F, h, w)."""
        source, states = cond[SOURCE].to(x_t), cond.get(STATES)
        given = source.new_zeros(len(source), FRAMES_TOLD, *source.shape[2:])
        given[:, :, 0] = 1
        prediction: Tensor = network(
            hidden_states=torch.cat([x_t, given, source], 1),
            timestep=model_time,
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            encoder_hidden_states_image=None if states is None else states.to(x_t.dtype),
            return_dict=False,
        )[0]
        return prediction

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions, the vision tower's states among them where there is one."""
        shapes, tower = super().cond_shapes(configs), configs.get("image_encoder")
        if tower is None:
            return shapes
        return shapes | {
            STATES: (1 + (tower["image_size"] // tower["patch_size"]) ** 2, tower["hidden_size"])
        }


WAN_I2V = WanImageToVideo()
