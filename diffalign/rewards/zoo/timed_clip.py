"""A CLIP with a time-conditioned vision tower: the network of SPO's step-aware preference model.

Liang et al. 2024, arXiv 2406.04314, section 3.2, with the names of RockeyCoss/SPO's checkpoints. The time
embedding is c = MLP(sinusoid(timestep)). From SiLU(c) each layer computes shift, scale and gate of its
attention and of its MLP (DiT's adaLN, Peebles and Xie 2022, arXiv 2212.09748):

    h = h + gate attention(LN(h) (1 + scale) + shift),    h = h + gate mlp(LN(h) (1 + scale) + shift),

and after the last LayerNorm the class token becomes token (1 + scale) + shift. The text tower is not
conditioned. Shifts and scales are initialised to 0 and gates to 1, so that the initial network equals the
CLIP to the bit (the released constructor sets every bias to one, which another function corrects).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from diffalign.rewards.zoo.clip import unit

FREQUENCIES = 256


def sinusoid(timestep: Real[Tensor, " B"], width: int = FREQUENCIES) -> Tensor:
    """Return (B, width): cosines, then sines, of timestep x 10000^(-i / (width / 2)).

    The result is float32, or float64 for a float64 ``timestep``. Frequencies are rounded to float32 in the
    published order of operations: at timestep 1000 another rounding changes the embedding by 1e-4.
    """
    half = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000) * half / (width // 2))
    angles = timestep.to(torch.promote_types(timestep.dtype, torch.float32))[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Maps integer timesteps (B,) to embeddings (B, width): sinusoid, Linear, SiLU, Linear."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for name, parameter in self.mlp.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, timestep: Real[Tensor, " B"]) -> Tensor:
        """Return the embedding c of each timestep."""
        weight = next(self.parameters())
        exact = timestep.to(torch.promote_types(weight.dtype, torch.float32))
        return self.mlp(sinusoid(exact).to(weight))


class TimedLayer(nn.Module):
    """A CLIP encoder layer with adaLN modulation of its attention and its MLP.

    Args of the constructor are the parts of a CLIP layer: ``self_attn(hidden_states=, attention_mask=)``
    returns a tuple whose first entry is (B, N, D); ``mlp`` and the norms map (B, N, D) to (B, N, D).
    """

    def __init__(
        self, self_attn: nn.Module, layer_norm1: nn.Module, mlp: nn.Module, layer_norm2: nn.Module, width: int
    ):
        super().__init__()
        self.self_attn = self_attn
        self.layer_norm1 = layer_norm1
        self.mlp = mlp
        self.layer_norm2 = layer_norm2
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, h: Float[Tensor, " B N D"], c: Float[Tensor, " B D"]) -> Tensor:
        """Return hidden states (B, N, D)."""
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        modulated = self.layer_norm1(h) * (1 + scale) + shift
        h = h + gate * self.self_attn(hidden_states=modulated, attention_mask=None)[0]
        return h + gate_mlp * self.mlp(self.layer_norm2(h) * (1 + scale_mlp) + shift_mlp)


class _Layers(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TimedVision(nn.Module):
    """A time-conditioned vision tower; it reuses the modules of the CLIP tower ``vision`` and their names."""

    def __init__(self, vision: Any, width: int):
        super().__init__()
        self.embeddings = vision.embeddings
        self.pre_layrnorm = vision.pre_layrnorm
        self.encoder = _Layers(
            [
                TimedLayer(layer.self_attn, layer.layer_norm1, layer.mlp, layer.layer_norm2, width)
                for layer in vision.encoder.layers
            ]
        )
        self.post_layernorm = vision.post_layernorm
        self.adaLN_modulation = _modulation(width, 2)

    def forward(self, pixels: Float[Tensor, " B 3 H W"], c: Float[Tensor, " B D"]) -> Tensor:
        """Return the class token, (B, D)."""
        h = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder.layers:
            h = layer(h, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.post_layernorm(h[:, 0]) * (1 + scale) + shift


def _modulation(width: int, parts: int) -> nn.Sequential:
    """Return SiLU and a Linear to ``parts`` x ``width``, initialised to output 0, and 1 for the gates."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for gate in (2, 5) if parts == 6 else ():
        nn.init.ones_(linear.bias[gate * width : (gate + 1) * width])
    return nn.Sequential(nn.SiLU(), linear)


class TimedClip(nn.Module):
    """A CLIPModel with a time-conditioned vision tower; it reuses the modules of ``clip``.

    Its state dict is the published one without the prefix ``model.``. A new one has the scores of ``clip``.
    """

    def __init__(self, clip: Any):
        super().__init__()
        width = clip.config.vision_config.hidden_size
        self.config = clip.config
        self.text_model = clip.text_model
        self.vision_model = TimedVision(clip.vision_model, width)
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.t_embedder = TimeEmbedding(width)

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return self.visual_projection.weight.dtype

    def text_embeddings(self, ids: Tensor) -> Tensor:
        """Return unit text embeddings (G, D), float32, of token ids (G, L)."""
        return unit(self.text_projection(self.text_model(input_ids=ids).pooler_output))

    def image_embeddings(self, pixels: Float[Tensor, " B 3 H W"], timestep: Real[Tensor, " B"]) -> Tensor:
        """Return unit image embeddings (B, D), float32, of normalised pixels estimated at ``timestep``."""
        return unit(self.visual_projection(self.vision_model(pixels, self.t_embedder(timestep))))

    def forward(self, pixels: Tensor, timestep: Tensor, ids: Tensor, owner: Tensor) -> Tensor:
        """Return scores (B,), float32; the prompt of image i is row ``owner[i]`` of ``ids`` (G, L)."""
        texts, images = self.text_embeddings(ids), self.image_embeddings(pixels, timestep)
        return self.logit_scale.float().exp() * (texts[owner] * images).sum(-1)
