"""A CLIP whose vision tower knows the time: the network of SPO's step-aware preference model.

Liang et al. 2024, arXiv 2406.04314, section 3.2, with the names of RockeyCoss/SPO's checkpoints. The time
reaches every layer: c = MLP(sinusoid(timestep)), and from SiLU(c) each layer makes shift, scale and gate of
its attention, then of its MLP (DiT's adaLN, Peebles and Xie 2022, arXiv 2212.09748):

    h = h + gate attention(LN(h) (1 + scale) + shift),    h = h + gate mlp(LN(h) (1 + scale) + shift),

and behind the last LayerNorm the class token becomes token (1 + scale) + shift. The text tower knows no
time. At the start all modulations are 0 but the gates, which are 1: the CLIP that it was made of, to the bit
(the released constructor leaves ones in every bias until another function mends it).
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
    """(B, width): cosines, then sines, of timestep 10000^(-i / (width / 2)); float32, or t's float64.

    Frequencies are rounded to float32 in the published order of operations: at timestep 1000 another rounding
    is another 1e-4 in what the network was trained on.
    """
    half = torch.arange(width // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(-math.log(10000) * half / (width // 2))
    angles = timestep.to(torch.promote_types(timestep.dtype, torch.float32))[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Integer timesteps (B,) to (B, width): the sinusoid through Linear, SiLU, Linear."""

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
    """A CLIP encoder layer whose two branches are shifted, scaled and gated by the time.

    Args of the constructor are the layer's own parts: ``self_attn(hidden_states=, attention_mask=)`` gives a
    tuple whose first is (B, N, D), ``mlp`` and the norms map (B, N, D) to itself.
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
        """(B, N, D)."""
        parts = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        looked = self.layer_norm1(h) * (1 + scale) + shift
        h = h + gate * self.self_attn(hidden_states=looked, attention_mask=None)[0]
        return h + gate_mlp * self.mlp(self.layer_norm2(h) * (1 + scale_mlp) + shift_mlp)


class _Layers(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class TimedVision(nn.Module):
    """The vision tower of a CLIP with time; it takes over the parts of ``vision``, under the same names."""

    def __init__(self, vision: Any, width: int):
        super().__init__()
        self.embeddings = vision.embeddings
        self.pre_layrnorm = vision.pre_layrnorm
        self.encoder = _Layers(
            [
                TimedLayer(old.self_attn, old.layer_norm1, old.mlp, old.layer_norm2, width)
                for old in vision.encoder.layers
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
    """SiLU and a Linear to ``parts`` of ``width`` that says 0 whatever the time, and 1 for the gates."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for gate in (2, 5) if parts == 6 else ():
        nn.init.ones_(linear.bias[gate * width : (gate + 1) * width])
    return nn.Sequential(nn.SiLU(), linear)


class TimedClip(nn.Module):
    """A CLIPModel whose vision tower knows the time; it takes over the parts of ``clip``.

    Its state dict is the published one less the prefix ``model.``. A fresh one scores as ``clip`` does.
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
        """Where it is."""
        return self.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.visual_projection.weight.dtype

    def words(self, ids: Tensor) -> Tensor:
        """Return unit text embeddings (G, D), float32, of token ids (G, L)."""
        return unit(self.text_projection(self.text_model(input_ids=ids).pooler_output))

    def looks(self, pixels: Float[Tensor, " B 3 H W"], timestep: Real[Tensor, " B"]) -> Tensor:
        """Return unit image embeddings (B, D), float32, of normalised pixels that were estimated at
        ``timestep``.
        """
        return unit(self.visual_projection(self.vision_model(pixels, self.t_embedder(timestep))))

    def forward(self, pixels: Tensor, timestep: Tensor, ids: Tensor, owner: Tensor) -> Tensor:
        """(B,) float32 scores; image i is of the prompt ``ids[owner[i]]`` (G, L)."""
        words, looks = self.words(ids), self.looks(pixels, timestep)
        return self.logit_scale.float().exp() * (words[owner] * looks).sum(-1)
