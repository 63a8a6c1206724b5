"""Gradient checkpointing, also of blocks that diffusers does not checkpoint.

Diffusers' motion UNet does not checkpoint attention over time, which needs most of the memory, and its 3D
UNet has no checkpoints.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Any]

LEFT_OUT = {
    "UNetMotionModel": ("AnimateDiffTransformer3D",),
    "UNet3DConditionModel": (
        "ResnetBlock2D",
        "TemporalConvLayer",
        "Transformer2DModel",
        "TransformerTemporalModel",
    ),
}
"""By a network's class in diffusers, the classes of its blocks that are checkpointed here."""


def enable_checkpointing(network: Any, function: Function | None = None) -> None:
    """Checkpoint a network's blocks in place.

    Args:
        function: calls a block in place of torch's checkpoint, (block, *inputs).
    """
    if network._supports_gradient_checkpointing:
        network.enable_gradient_checkpointing(function)
    for block in _left_out(network):
        block.forward = partial(_call, block, function or partial(checkpoint, use_reentrant=False))


def disable_checkpointing(network: Any) -> None:
    """Remove all checkpoints."""
    if network._supports_gradient_checkpointing:
        network.disable_gradient_checkpointing()
    for block in _left_out(network):
        block.__dict__.pop("forward", None)


def _left_out(network: nn.Module) -> list[nn.Module]:
    names = LEFT_OUT.get(type(network).__name__, ())
    return [module for module in network.modules() if type(module).__name__ in names]


def _call(block: nn.Module, function: Function, *inputs: Any, **named: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return function(partial(forward, **named), *inputs)
