"""Gradient checkpointing, also of blocks that diffusers does not checkpoint.

Diffusers' motion UNet does not checkpoint attention over time, which needs most of the memory, and its 3D
UNet has no checkpoints. Its Chroma transformer calls a checkpointed single block without the mask of the
text, and so trains another function: all its checkpoints are made here.
"""

from collections.abc import Callable
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


def enable_checkpointing(network: Any, function: Function | None = None) -> None:
    """Checkpoint a network's blocks in place.

    Args:
        function: calls a block in place of torch's checkpoint, (block, *inputs).
    """
    if _by_diffusers(network):
        network.enable_gradient_checkpointing(function)
    for block in _left_out(network):
        block.forward = partial(_call, block, function or partial(checkpoint, use_reentrant=False))


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


def _call(block: nn.Module, function: Function, *inputs: Any, **named: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return function(partial(forward, **named), *inputs)
