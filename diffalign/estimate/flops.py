"""Count the FLOPs of operators inside a context, from the shapes of their operands.

Torch's own counter supports some fused attention operators and silently counts 0 for others, such as the
CPU's; which operator runs depends on the device and the release. Here every fused attention operator is
recognised by its name, and its FLOPs follow from the shapes of query, key and value.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Parts of the names of fused attention operators, forward and backward."""


class Flops(TorchDispatchMode):
    """Add up the FLOPs, at 2 per multiply-add, of matrix products, convolutions and attention.

    Attributes:
        total: FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add its FLOPs."""
        named = kwargs or {}
        out = func(*args, **named)
        packet = func._overloadpacket
        if any(part in packet.__name__ for part in ATTENTION):
            backward = packet.__name__.endswith("backward")
            query, key, value = (tuple(x.shape) for x in (args[1:4] if backward else args[:3]))
            self.total += attention_flops(query, key, value, backward)
        elif packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **named, out_val=out))
        return out


def attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], backward: bool = False
) -> int:
    """Return the FLOPs of scaled dot-product attention, of its forward or of its backward.

    The forward has two products: scores = query key^T, and scores value. The backward of a fused kernel has
    five: it recomputes the scores, then computes the gradients of value, scores, query and key (Dao et al.
    2022, arXiv 2205.14135, algorithm 4). Masks, causal ones included, do not reduce the count.

    Args:
        query: shape (*batch, heads, L, E).
        key: shape (*batch, heads of keys, S, E).
        value: shape (*batch, heads of keys, S, E_v).
    """
    *batch, length, width = query
    product = 2 * prod(batch) * length * key[-2]
    return product * (3 * width + 2 * value[-1]) if backward else product * (width + value[-1])


PRODUCTS = frozenset(
    {
        *(getattr(torch, f"conv{n}d") for n in (1, 2, 3)),
        *(getattr(torch, f"conv_transpose{n}d") for n in (1, 2, 3)),
        *(getattr(where, name) for where in (torch, Tensor) for name in ("matmul", "mm", "bmm", "baddbmm")),
        torch.einsum,
        nn.functional.linear,
        nn.functional.scaled_dot_product_attention,
    }
)
"""Functions that autocast runs in half precision on a GPU, among those that networks call."""

EXACT = frozenset(
    {
        *(
            getattr(where, name)
            for where in (torch, Tensor)
            for name in ("softmax", "exp", "pow", "rsqrt", "sum")
        ),
        nn.functional.layer_norm,
        nn.functional.group_norm,
        nn.functional.softmax,
    }
)
"""Functions that autocast runs in float32."""


class AsOnGpu(TorchFunctionMode):
    """Applies the fused attention and the autocast of a GPU to meta tensors.

    On the meta device torch has no autocast, and scaled dot-product attention is two products that save the
    matrix of scores.

    Args:
        autocast: dtype of ``training.mixed_precision``; None: no autocast.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self._autocast = autocast
        self._casts: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function with the casts and kernels of a GPU."""
        named = kwargs or {}
        if self._autocast is not None and (func in PRODUCTS or func in EXACT):
            dtype = self._autocast if func in PRODUCTS else torch.float32
            args = [self._cast(x, dtype) for x in args]
            named = {name: self._cast(x, dtype) for name, x in named.items()}
        if func is nn.functional.scaled_dot_product_attention:
            return _fused_attention(*args, **named)
        return func(*args, **named)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        """Cast a floating-point tensor; the copy of a weight is reused inside the context, as in autocast."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(dtype)
        if x not in self._casts:
            self._casts[x] = x.to(dtype)
        return self._casts[x]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call a fused kernel of torch with the parameters of ``scaled_dot_product_attention``.

    It is the CPU's, which accepts masks of any shape. It saves the same tensors for the backward as the
    others: query, key, value, the result and a log-sum-exp per query.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out
