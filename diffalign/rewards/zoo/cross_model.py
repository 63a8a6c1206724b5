"""The cross model of MPS: image tokens cross-attend to the tokens of a prompt.

Zhang et al. 2024, arXiv 2405.14705, section 4. The blocks are those of PaLM (arXiv 2204.02311): multi-query
attention in parallel with a gated feed-forward, without biases. Sizes are read from the weights.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_PERIOD = 10000


def rotated(x: Float[Tensor, " *b L d"]) -> Float[Tensor, " *b L d"]:
    """Apply rotary position embedding (arXiv 2104.09864) in float32; it rotates pairs x_j, x_{j + d/2}."""
    length, width = x.shape[-2:]
    rates = _MAX_PERIOD ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * rates
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class _Gate(nn.Module):
    """SwiGLU: the first half times SiLU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Multi-query attention.

    Args:
        queries: (B, L, heads x d).
        keys: (B, M, d), one head.
        values: (B, M, d), one head.
        mask: (B, M), true for keys that are attended to; None: all.

    Returns:
        (B, L, heads x d).
    """
    batch, length, width = queries.shape
    heads = queries.view(batch, length, -1, keys.shape[-1]).transpose(1, 2)
    keys, values = (x[:, None].expand(-1, heads.shape[1], -1, -1) for x in (keys, values))
    attn_mask = None if mask is None else mask[:, None, None]
    output = F.scaled_dot_product_attention(heads, keys, values, attn_mask=attn_mask)
    return output.transpose(1, 2).reshape(batch, length, width)


class Across(nn.Module):
    """Cross-attention to the prompt, in parallel with a feed-forward."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), _Gate(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, x: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Return x (B, L, D) plus the outputs of both branches."""
        h = self.norm(x)
        keys, values = self.to_kv(text_tokens).chunk(2, dim=-1)
        attended = _attend(self.to_q(h), keys, values, mask)
        return x + self.to_out(attended) + self.ff(h)


class Within(nn.Module):
    """Self-attention of the image with rotary positions, in parallel with a feed-forward."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.parts = (inner, head, head, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(_Gate(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, L, D) plus the outputs of both branches."""
        queries, keys, values, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        heads = queries.unflatten(-1, (-1, keys.shape[-1]))
        queries = rotated(heads.transpose(1, 2)).transpose(1, 2).flatten(2)
        return x + self.attn_out(_attend(queries, rotated(keys), values)) + self.ff_out(hidden)


class CrossLayer(nn.Module):
    """Cross-attention to the prompt, then self-attention."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.across = Across(width, inner, head, hidden)
        self.within = Within(width, inner, head, hidden)

    def forward(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """Return image tokens (B, L, D)."""
        return self.within(self.across(image_tokens, text_tokens, mask))


class CrossModel(nn.Module):
    """A stack of ``CrossLayer``s.

    Args of the constructor: number of layers, width D of tokens, width of all query heads, width of a head,
    and hidden width of the feed-forwards.
    """

    def __init__(self, layers: int, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList([CrossLayer(width, inner, head, hidden) for _ in range(layers)])

    def forward(
        self,
        image_tokens: Float[Tensor, "B L D"],
        text_tokens: Float[Tensor, "B M D"],
        mask: Bool[Tensor, "B M"],
    ) -> Float[Tensor, "B L D"]:
        """Return the image tokens after all layers; ``mask`` is true for text tokens that are attended to."""
        for layer in self.layers:
            image_tokens = layer(image_tokens, text_tokens, mask)
        return image_tokens


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published weights (without the prefix ``mps.cross_model.``) to those of ``CrossModel``.

    The frequencies of the rotary embedding are dropped, since they are computed. Missing biases of norms are
    0, as in the published class.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("inv_freq"):
            continue
        match = re.fullmatch(r"layers\.(\d+)\.([01])\.fn\.(.+)", key)
        if match is None:
            named[key] = tensor  # an unknown name, which `fill` refuses
            continue
        number, which, rest = match.groups()
        named[f"layers.{number}.{('across', 'within')[int(which)]}.{rest}"] = tensor
    for key, tensor in list(named.items()):
        if key.endswith(".norm.weight"):
            named.setdefault(key.replace(".weight", ".bias"), torch.zeros_like(tensor))
    return named


def empty_cross_model(state: Mapping[str, Tensor]) -> CrossModel:
    """Return a CrossModel on the meta device, with the sizes of these weights.

    Raises:
        KeyError: the weights have no first layer.
    """
    layers = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"layers\.\d+\.", key)), default=0)
    inner, width = state["layers.0.across.to_q.weight"].shape
    head = len(state["layers.0.across.to_kv.weight"]) // 2
    hidden = len(state["layers.0.across.ff.0.weight"]) // 2
    with torch.device("meta"):
        return CrossModel(layers, width, inner, head, hidden)
