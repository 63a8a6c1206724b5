"""Z-Image and Z-Image-Turbo (Tongyi-MAI 2025, arXiv 2511.22699): Qwen3-4B reads the prompt, one stream of
image and text tokens, rectified flow.

The network counts time from noise to data, it takes 1 - t, and predicts the velocity in that direction;
``call`` turns its sign, so that the prediction is a flow's eps - x0. It takes lists: one image (C, 1, h, w)
and the states of one prompt, without padding, per sample.

The stock pipeline's ``guidance_scale`` s stands for pos + s (pos - neg): ours is 1 + s, and a guidance of 1
(Turbo's published one) is its 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.chat import QWEN3_4B, ReadByChat, lengths_of, padded
from diffalign.models.families.flow import SIDE, SpacedEvenly
from diffalign.models.families.flux import CONFIGS as FLUX_CONFIGS
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "all_patch_size": (SIDE,),
        "all_f_patch_size": (1,),
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "qk_norm": True,
        "cap_feat_dim": 2560,
        "axes_dims": (32, 48, 48),
        "axes_lens": (1536, 512, 512),
    },
    "vae": FLUX_CONFIGS["vae"],
    "text_encoder": QWEN3_4B,
}


@dataclass(frozen=True)
class ZImage(SpacedEvenly, ReadByChat):
    """The family ``z_image``.

    Attributes:
        max_sequence_length: tokens of Qwen3, those of its chat template among them.
    """

    name: str = "z_image"
    network_name: str = "transformer"
    network_class: str = "ZImageTransformer2DModel"
    codec: Codec = Images()

    most_tokens: ClassVar[int | None] = 512

    masks_attention: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Z-Image's components."""
        return CONFIGS

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """2, the only one that the pipeline uses."""
        return SIDE

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 2560), Qwen3's last but one, and ``encoder_attention_mask``
        (B, tokens), 1 up to the prompt's end and 0 behind it, float32.
        """
        own = list(prompts)  # which the pipeline overwrites
        states, _ = self.encoded(pipeline, own, do_classifier_free_guidance=False)
        full, mask = padded(states, self.max_sequence_length)
        return {"encoder_hidden_states": full, "encoder_attention_mask": mask}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's prediction of eps - x0, (B, C, h, w)."""
        text = cond["encoder_hidden_states"].to(x_t.dtype)
        lengths = lengths_of(cond["encoder_attention_mask"])
        predictions: list[Tensor] = network(
            list(x_t.unsqueeze(2).unbind(0)),
            (1000 - model_time) / 1000,
            [states[:length] for states, length in zip(text, lengths, strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(predictions).squeeze(2)

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        width, tokens = configs["transformer"]["cap_feat_dim"], self.max_sequence_length
        return {"encoder_hidden_states": (tokens, width), "encoder_attention_mask": (tokens,)}


Z_IMAGE = ZImage()
