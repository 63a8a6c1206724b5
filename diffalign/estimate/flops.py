"""FLOPs of the operators that run inside a context, counted from the shapes of their operands alone.

Torch's own counter knows some of the fused attention operators and counts 0 for the rest without a word, the
CPU's among them; which one runs depends on the device and the release. Here every operator of that kind is
recognised by its name, and its cost follows from the shapes of query, key and value.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Parts of the names of the fused attention operators, forward and backward."""


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

    The forward is two products, scores = query key^T and scores value. The backward of a fused kernel is
    five: it computes the scores again, then the gradients of value, of the scores, of query and of key (Dao
    et al. 2022, arXiv 2205.14135, algorithm 4). A mask, a causal one as well, saves nothing.

    Args:
        query: shape (*batch, heads, L, E).
        key: shape (*batch, heads of keys, S, E).
        value: shape (*batch, heads of keys, S, E_v).
    """
    *batch, length, width = query
    product = 2 * prod(batch) * length * key[-2]
    return product * (3 * width + 2 * value[-1]) if backward else product * (width + value[-1])
