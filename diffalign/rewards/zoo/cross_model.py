"""MPS's cross model: image tokens that look at the tokens of a prompt.

Zhang et al. 2024, arXiv 2405.14705, section 4; the blocks are PaLM's (arXiv 2204.02311): attention with many
queries and one head of keys and values, a gated feed-forward beside it, no bias. Sizes are those of the
weights.
"""

import re
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_PERIOD = 10000


def rotated(x: Float[Tensor, " *b L d"]) -> Float[Tensor, " *b L d"]:
    """Rotary position embedding (arXiv 2104.09864) in float32: a position turns pairs x_j, x_{j + d/2}."""
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


def _attend(queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
    """(B, L, heads x d) queries, one head (B, M, d) of keys and values, kept (B, M) -> (B, L, heads x d)."""
    batch, length, width = queries.shape
    heads = queries.view(batch, length, -1, keys.shape[-1]).transpose(1, 2)
    keys, values = (x[:, None].expand(-1, heads.shape[1], -1, -1) for x in (keys, values))
    mask = None if kept is None else kept[:, None, None]
    seen = F.scaled_dot_product_attention(heads, keys, values, attn_mask=mask)
    return seen.transpose(1, 2).reshape(batch, length, width)


class Across(nn.Module):
    """Attention to the prompt and, beside it, a feed-forward."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), _Gate(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, x: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        """x (B, L, D) and what it adds to itself."""
        h = self.norm(x)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        seen = _attend(self.to_q(h), keys, values, kept)
        return x + self.to_out(seen) + self.ff(h)


class Within(nn.Module):
    """Attention of the image to itself, with rotary positions, and beside it a feed-forward."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.parts = (inner, head, head, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Sequential(_Gate(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, L, D) and what it adds to itself."""
        queries, keys, values, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        heads = queries.unflatten(-1, (-1, keys.shape[-1]))
        turned = rotated(heads.transpose(1, 2)).transpose(1, 2).flatten(2)
        return x + self.attn_out(_attend(turned, rotated(keys), values)) + self.ff_out(wide)


class CrossLayer(nn.Module):
    """The image looks at the prompt, then at itself."""

    def __init__(self, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.across = Across(width, inner, head, hidden)
        self.within = Within(width, inner, head, hidden)

    def forward(self, looks: Tensor, words: Tensor, kept: Tensor) -> Tensor:
        """Image tokens (B, L, D)."""
        return self.within(self.across(looks, words, kept))


class CrossModel(nn.Module):
    """Layers over image tokens."""

    def __init__(self, layers: int, width: int, inner: int, head: int, hidden: int):
        super().__init__()
        self.layers = nn.ModuleList([CrossLayer(width, inner, head, hidden) for _ in range(layers)])

    def forward(
        self, looks: Float[Tensor, "B L D"], words: Float[Tensor, "B M D"], kept: Bool[Tensor, "B M"]
    ) -> Float[Tensor, "B L D"]:
        """Image tokens that have looked at those tokens of the prompt which are kept."""
        for layer in self.layers:
            looks = layer(looks, words, kept)
        return looks


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the published weights, less the prefix ``mps.cross_model.``, under the names of ``CrossModel``.

    The rates of the rotary embedding are left out, for they are no weights, and biases of norms that are not
    there are 0, as they always are in the published class.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key.endswith("inv_freq"):
            continue
        found = re.fullmatch(r"layers\.(\d+)\.([01])\.fn\.(.+)", key)
        if found is None:
            named[key] = tensor  # a name that fits nowhere, and is refused as such
            continue
        number, which, rest = found.groups()
        named[f"layers.{number}.{('across', 'within')[int(which)]}.{rest}"] = tensor
    for key, tensor in list(named.items()):
        if key.endswith(".norm.weight"):
            named.setdefault(key.replace(".weight", ".bias"), torch.zeros_like(tensor))
    return named


def empty_cross_model(state: Mapping[str, Tensor]) -> CrossModel:
    """Return a CrossModel of the sizes of such weights, without memory for its own.

    Raises:
        KeyError: the first layer is not among them.
    """
    layers = 1 + max((int(key.split(".")[1]) for key in state if re.match(r"layers\.\d+\.", key)), default=0)
    inner, width = state["layers.0.across.to_q.weight"].shape
    head = len(state["layers.0.across.to_kv.weight"]) // 2
    hidden = len(state["layers.0.across.ff.0.weight"]) // 2
    with torch.device("meta"):
        return CrossModel(layers, width, inner, head, hidden)
