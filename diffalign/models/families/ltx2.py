"""LTX-2 (HaCohen et al. 2026, arXiv 2601.03233), the video of it: all layers of a Gemma 3 read the prompt, a
transformer of two streams, video and sound, rectified flow with a shift that grows with the video.

Pairs of videos say nothing of sound, so the video's stream is trained and sampled alone: the attention
between the two is off (``isolate_modalities``, which the stock pipeline has for its guidance), and in the
place of the sound stands one empty token. What belongs to sound gets no gradient and stays as it is
(``idle``). The stock pipeline draws both streams together: its videos differ from those of rollouts, with the
same weights.

Gemma's states are packed by the pipeline's ``connectors`` before they are cached: 49 layers of 3840 channels
would be 770 MB a prompt. The network takes a frame rate: the 24 of the stock pipeline.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Videos
from diffalign.models.families.base import bare
from diffalign.models.families.flow import SpacedEvenly, masked, masked_shapes
from diffalign.models.families.ltx import decoder_times, moments
from diffalign.models.families.max_sequence_length import MaxSequenceLength
from diffalign.types import Cond

FRAME_RATE = 24.0

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # LTX-2 19B, by diffusers' converter
        "in_channels": 128,
        "out_channels": 128,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "cross_attention_dim": 4096,
        "audio_num_attention_heads": 32,
        "audio_attention_head_dim": 64,
        "audio_cross_attention_dim": 2048,
        "num_layers": 48,
        "caption_channels": 3840,
        "patch_size": 1,
        "rope_type": "split",
    },
    "vae": {
        "_class_name": "AutoencoderKLLTX2Video",
        "latent_channels": 128,
        "block_out_channels": (256, 512, 1024, 2048),
        "decoder_block_out_channels": (256, 512, 1024),
        "layers_per_block": (4, 6, 6, 2, 2),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "patch_size": 4,
        "patch_size_t": 1,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
    "text_encoder": {  # google/gemma-3-12b-it
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "connectors": {
        "_class_name": "LTX2TextConnectors",
        "caption_channels": 3840,
        "text_proj_in_factor": 49,
        "video_connector_num_attention_heads": 30,
        "video_connector_attention_head_dim": 128,
    },
}


@dataclass(frozen=True)
class LTX2Video(SpacedEvenly, MaxSequenceLength):
    """The family ``ltx2``.

    Attributes:
        max_sequence_length: tokens of Gemma.
    """

    max_sequence_length: int = 1024
    name: str = "ltx2"
    network_name: str = "transformer"
    network_class: str = "LTX2VideoTransformer3DModel"
    codec: Codec = Videos(
        width=lambda config: int(config["latent_channels"]),
        space=lambda config: int(config["spatial_compression_ratio"]),
        stride=lambda config: int(config["temporal_compression_ratio"]),
        moments=moments,
        times=decoder_times,
    )
    text_encoders: tuple[str, ...] = ("text_encoder", "connectors")

    idle: ClassVar[tuple[str, ...]] = ("audio", "av_cross_attn", "a2v")

    masks_attention: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of LTX-2 19B's components."""
        return CONFIGS

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3840) as the connectors make them for the video, and
        ``encoder_attention_mask`` (B, tokens), float32.
        """
        states, mask, *_ = self.encoded(pipeline, prompts, do_classifier_free_guidance=False)
        with torch.no_grad():
            video, _, kept = pipeline.connectors(states, mask, padding_side=pipeline.tokenizer.padding_side)
        return masked(video, kept)

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction of the video, (B, C, F, h, w)."""
        frames, height, width = x_t.shape[2:]
        config = bare(network).config
        sound = config.caption_channels if config.use_prompt_embeddings else config.audio_cross_attention_dim
        prediction: Tensor = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            audio_hidden_states=x_t.new_zeros(len(x_t), 1, config.audio_in_channels),
            encoder_hidden_states=cond["encoder_hidden_states"].to(x_t.dtype),
            audio_encoder_hidden_states=x_t.new_zeros(len(x_t), 1, sound),
            timestep=model_time,
            sigma=model_time,
            encoder_attention_mask=cond["encoder_attention_mask"],
            num_frames=frames,
            height=height,
            width=width,
            fps=FRAME_RATE,
            audio_num_frames=1,
            isolate_modalities=True,
            return_dict=False,
        )[0]
        video: Tensor = prediction.transpose(1, 2).unflatten(2, (frames, height, width))
        return video

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        connectors = configs["connectors"]
        heads = connectors["video_connector_num_attention_heads"]
        return masked_shapes(
            self.max_sequence_length, heads * connectors["video_connector_attention_head_dim"]
        )


LTX2 = LTX2Video()
