"""Gradient checkpointing, of all blocks or of every n-th, also of blocks that diffusers does not checkpoint.

Diffusers' motion UNet does not checkpoint attention over time, which needs most of the memory, and its 3D
UNet has no checkpoints. Its Chroma transformer calls a checkpointed single block without the mask of the
text, and so trains another function: all its checkpoints are made here.

A network of diffusers gives every block to one function, which calls it through a checkpoint. For every n-th
block that function calls the others as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Any]

LEFT_OUT = {
    "ChromaTransformer2DModel": ("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    "UNetMotionModel": ("AnimateDiffTransformer3D",),
    "UNet3DConditionModel": (
        "ResnetBlock2D",
        "TemporalConvLayer",
        "Transformer2DModel",
        "TransformerTemporalModel",
    ),
}
"""By a network's class in diffusers, the classes of its blocks that are checkpointed here."""

WRONG = ("ChromaTransformer2DModel",)
"""Networks that compute something else with diffusers' own checkpoints, which stay off."""


@dataclass(eq=False)
class EveryNth:
    """Calls every n-th block through a checkpoint, and the other blocks as they are.

    Blocks of each class are counted by themselves, in the order in which the first forward comes to them, and
    the first is checkpointed: of a UNet, whose residual blocks and transformer blocks alternate, every second
    of both. A block keeps its number, so that its recomputation and later forwards decide alike.

    Attributes:
        function: calls a block through a checkpoint, (block, *inputs).
        every: n; 1 checkpoints all blocks.
        numbers: number of each block within its class, from 0.
    """

    function: Function
    every: int = 1
    numbers: dict[nn.Module, int] = field(default_factory=dict)

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """Return the outputs of a block."""
        return self.function(block, *inputs) if self.chosen(block) else block(*inputs)

    def chosen(self, block: nn.Module) -> bool:
        """Return whether a block is checkpointed."""
        if self.every == 1:
            return True
        if block not in self.numbers:
            self.numbers[block] = sum(type(other) is type(block) for other in self.numbers)
        return self.numbers[block] % self.every == 0


def enable_checkpointing(network: Any, function: Function | None = None, every: int = 1) -> None:
    """Checkpoint a network's blocks in place.

    Args:
        function: calls a block in place of torch's checkpoint, (block, *inputs).
        every: every how many blocks one is checkpointed; 1: all.
    """
    blocks = EveryNth(function or partial(checkpoint, use_reentrant=False), every)
    if _by_diffusers(network):
        network.enable_gradient_checkpointing(function if every == 1 else blocks)
    for block in _left_out(network):
        block.forward = partial(_call, block, blocks)


def disable_checkpointing(network: Any) -> None:
    """Remove all checkpoints."""
    if _by_diffusers(network):
        network.disable_gradient_checkpointing()
    for block in _left_out(network):
        block.__dict__.pop("forward", None)


def _by_diffusers(network: Any) -> bool:
    return network._supports_gradient_checkpointing and type(network).__name__ not in WRONG


def _left_out(network: nn.Module) -> list[nn.Module]:
    names = LEFT_OUT.get(type(network).__name__, ())
    return [module for module in network.modules() if type(module).__name__ in names]


def _call(block: nn.Module, blocks: EveryNth, *inputs: Any, **named: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled() or not blocks.chosen(block):
        return forward(*inputs, **named)
    return blocks.function(partial(forward, **named), *inputs)
