"""Kandinsky 5.0 Image (Kandinsky Lab 2025, arXiv 2511.14993): Qwen2.5-VL and CLIP read the prompt, a
transformer with cross-attention over FLUX.1's latents, rectified flow.

The network sees an image as a video of one frame, channels last, and has no mask for text: in a batch of
several prompts the stock pipeline lets the shorter ones attend to padding. Here a prompt is read and
predicted for as the stock pipeline does it alone, so that a batch has one call for each length of a prompt.

The stock pipeline draws seven sizes and takes the nearest for any other; training takes any.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffalign.models.codecs import Codec, Images
from diffalign.models.families.base import flow_grid
from diffalign.models.families.chat import ReadByChat, lengths_of, padded
from diffalign.models.families.flow import masked_shapes
from diffalign.models.families.flux import CONFIGS as FLUX_CONFIGS
from diffalign.models.families.qwen_image import CONFIGS as QWEN_CONFIGS
from diffalign.types import Cond

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # Kandinsky-5.0-T2I-Lite
        "in_visual_dim": 16,
        "out_visual_dim": 16,
        "in_text_dim": 3584,
        "in_text_dim2": 768,
        "time_dim": 512,
        "patch_size": (1, 2, 2),
        "model_dim": 2560,
        "ff_dim": 10240,
        "num_text_blocks": 2,
        "num_visual_blocks": 50,
        "axes_dims": (32, 48, 48),
    },
    "vae": {**FLUX_CONFIGS["vae"], "shift_factor": None},  # which its pipeline leaves out
    "text_encoder": QWEN_CONFIGS["text_encoder"],
    "text_encoder_2": FLUX_CONFIGS["text_encoder"],
}


@dataclass(frozen=True)
class Kandinsky5(ReadByChat):
    """The family ``kandinsky5``.

    Attributes:
        max_sequence_length: tokens of the prompt for Qwen, and of the template behind it.
    """

    name: str = "kandinsky5"
    network_name: str = "transformer"
    network_class: str = "Kandinsky5Transformer3DModel"
    codec: Codec = Images(shifted=False)
    text_encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2")

    most_tokens: ClassVar[int | None] = 1024

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of Kandinsky-5.0-T2I-Lite's components."""
        return CONFIGS

    def latent_channels(self, network_config: Mapping[str, Any]) -> int:
        """``in_visual_dim``."""
        return int(network_config["in_visual_dim"])

    def patch(self, network_config: Mapping[str, Any]) -> int:
        """Return the side of ``patch_size``, which is one latent frame deep."""
        return int(network_config["patch_size"][-1])

    def reader(self, pipeline: Any) -> tuple[str, int]:
        """Return Qwen's tokenizer; the tokens that the template behind the prompt leaves to it."""
        template = pipeline.tokenizer(text=[pipeline.prompt_template.format("")])["input_ids"][0]
        behind = len(template) - pipeline.prompt_template_encode_start_idx
        return "tokenizer", self.max_sequence_length - behind

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """As the scheduler makes it."""
        patch = self.patch(network_config)
        return flow_grid(scheduler, steps, (shape[-2] // patch) * (shape[-1] // patch))

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3584) with ``encoder_attention_mask`` (B, tokens), 1 up to
        the prompt's end, of Qwen, and ``pooled_projections`` (B, 768) of CLIP, float32.
        """
        states, pooled = [], []
        for prompt in prompts:  # alone: without padding, to which the encoder would attend
            one, vector, _ = self.encoded(pipeline, [prompt])
            states.append(one[0])
            pooled.append(vector[0].float())
        full, mask = padded(states, self.max_sequence_length)
        return {
            "encoder_hidden_states": full,
            "encoder_attention_mask": mask,
            "pooled_projections": torch.stack(pooled),
        }

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        lengths = lengths_of(cond["encoder_attention_mask"])
        if len(set(lengths)) == 1:
            return self._of_one_length(network, x_t, model_time, cond, lengths[0])
        prediction = torch.empty_like(x_t)
        for length in dict.fromkeys(lengths):
            chosen = torch.tensor([own == length for own in lengths], device=x_t.device)
            part = {name: value[chosen] for name, value in cond.items()}
            own = self._of_one_length(network, x_t[chosen], model_time[chosen], part, length)
            prediction = prediction.to(own.dtype).masked_scatter(chosen.view(-1, 1, 1, 1), own)
        return prediction

    def _of_one_length(
        self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond, length: int
    ) -> Tensor:
        device, (height, width) = x_t.device, x_t.shape[-2:]
        prediction: Tensor = network(
            hidden_states=x_t.permute(0, 2, 3, 1).unsqueeze(1),
            encoder_hidden_states=cond["encoder_hidden_states"][:, :length].to(x_t.dtype),
            pooled_projections=cond["pooled_projections"].to(x_t.dtype),
            timestep=model_time,
            visual_rope_pos=[torch.arange(n, device=device) for n in (1, height // 2, width // 2)],
            text_rope_pos=torch.arange(length, device=device),
            return_dict=False,
        )
        return prediction.squeeze(1).permute(0, 3, 1, 2)

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        network = configs["transformer"]
        pooled = {"pooled_projections": (network["in_text_dim2"],)}
        return masked_shapes(self.max_sequence_length, network["in_text_dim"]) | pooled


KANDINSKY5 = Kandinsky5()
