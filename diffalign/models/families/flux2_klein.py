"""FLUX.2 klein (Black Forest Labs 2026): three layers of a Qwen3 read the prompt, a transformer over packed
latents, rectified flow.

Latents are what the network sees: 2 x 2 of the autoencoder's as the channels of one, normalised, (B, 128, h,
w), see ``diffalign.models.packed_codec``. ``call`` only lays them in a row beside their places (time, row,
column, number of the word). The latents of a source image to edit follow them at time 10, as the first
reference image of the stock pipeline, and their prediction is dropped. The network takes t, not 1000 t, and
no guidance: the base models are guided
as usual, the distilled ones (``is_distilled``) are sampled with a guidance of 1, whatever the stock pipeline
is told.

The shift of the stock pipeline's times depends on the number of steps (``empirical_mu``), so that no line
over tokens describes it; a training run's ``shift: dynamic`` takes FLUX.1's line, which is that of 200 steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffalign.models.codecs import Codec
from diffalign.models.families.base import flow_grid
from diffalign.models.families.chat import QWEN3_4B, ReadByChat
from diffalign.models.families.sd3 import CONFIGS as SD3_CONFIGS
from diffalign.models.families.sources import SOURCE, AsLatents, SourceImages
from diffalign.models.packed_codec import NormalisedPatches
from diffalign.types import Cond

LAYERS = (9, 18, 27)  # of Qwen3, whose states are the channels of a token
REFERENCE = 10  # the time of the first reference image

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "transformer": {  # klein 4B
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "guidance_embeds": False,
    },
    "vae": {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": SD3_CONFIGS["vae"]["down_block_types"],
        "up_block_types": SD3_CONFIGS["vae"]["up_block_types"],
        "layers_per_block": 2,
        "latent_channels": 32,
    },
    "text_encoder": {**QWEN3_4B, "architectures": ["Qwen3ForCausalLM"]},
}

LARGE: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        **CONFIGS["transformer"],
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    "text_encoder": {  # Qwen/Qwen3-8B
        **CONFIGS["text_encoder"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
}
"""What differs in klein 9B."""


@dataclass(frozen=True)
class Flux2Klein(ReadByChat):
    """The family ``flux2_klein``.

    Attributes:
        max_sequence_length: tokens of Qwen3, those of its chat template among them.
    """

    name: str = "flux2_klein"
    network_name: str = "transformer"
    network_class: str = "Flux2Transformer2DModel"
    codec: Codec = NormalisedPatches()

    most_tokens: ClassVar[int | None] = 512
    thinking: ClassVar[bool] = False
    sources: ClassVar[SourceImages | None] = AsLatents()

    shares_tokens: ClassVar[bool] = True

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Configurations of klein 4B's components."""
        return CONFIGS

    def grid(
        self, scheduler: Any, network_config: Mapping[str, Any], steps: int, shape: tuple[int, ...]
    ) -> Float[Tensor, " S"]:
        """Evenly spaced from 1 to 1 / steps, then shifted by ``empirical_mu``."""
        tokens = shape[-2] * shape[-1]
        return flow_grid(scheduler, steps, tokens, own_sigmas=True, mu=empirical_mu(tokens, steps))

    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
        """``encoder_hidden_states`` (B, tokens, 3 x Qwen3's width), padding included, float32."""
        states, _ = self.encoded(pipeline, prompts)
        return {"encoder_hidden_states": states.float()}

    def call(self, network: nn.Module, x_t: Tensor, model_time: Tensor, cond: Cond) -> Tensor:
        """Return the transformer's raw prediction, (B, C, h, w)."""
        text, (count, _, height, width) = cond["encoder_hidden_states"].to(x_t.dtype), x_t.shape
        shown, ids = [x_t], [places(height, width, 1, x_t.device)]
        if SOURCE in cond:
            shown.append(cond[SOURCE].to(x_t.dtype))
            rows, columns = shown[1].shape[-2:]
            ids.append(places(rows, columns, 1, x_t.device, REFERENCE))
        prediction: Tensor = network(
            hidden_states=torch.cat([one.flatten(2).transpose(1, 2) for one in shown], 1),
            timestep=model_time / 1000,
            guidance=self.guidance(network, x_t),
            encoder_hidden_states=text,
            img_ids=torch.cat(ids).expand(count, -1, -1),
            txt_ids=places(1, 1, text.shape[1], x_t.device).expand(count, -1, -1),
            return_dict=False,
        )[0]
        return prediction[:, : height * width].transpose(1, 2).unflatten(2, (height, width))

    def guidance(self, network: nn.Module, x_t: Tensor) -> Tensor | None:
        """None: klein has no guidance embedded."""
        return None

    def cond_shapes(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's conditions."""
        width = configs["transformer"]["joint_attention_dim"]
        return {"encoder_hidden_states": (self.max_sequence_length, width)}


def places(height: int, width: int, words: int, device: torch.device, time: int = 0) -> Int[Tensor, "N 4"]:
    """Return (time, row, column, number of the word) of each token, rows after one another."""
    ranges = [torch.arange(size, device=device) for size in (1, height, width, words)]
    ranges[0] = ranges[0] + time
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).flatten(0, 3)


def empirical_mu(tokens: int, steps: int) -> float:
    """Return the mu that FLUX.2 is sampled with: between a line over the tokens for 10 steps and one for 200,
    linear in the steps; the latter for more than 4300 tokens (diffusers' ``compute_empirical_mu``).
    """
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    return many + (many - few) / 190 * (steps - 200)


FLUX2_KLEIN = Flux2Klein()
