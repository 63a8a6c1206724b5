"""Activations that wait for the backward in main memory.

What autograd keeps of a network's forward is copied to pinned main memory as soon as it is kept, and back to
the device when the backward asks for it, as ``torch.autograd.graph.save_on_cpu`` does; the weights among it,
which that would copy at every step as well, stay where they are. With gradient checkpointing these are the
inputs of blocks; what a block recomputes stays on the device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffalign.errors import UserError

Packed = tuple[torch.device, Tensor] | Tensor


def check_offload(device: torch.device) -> None:
    """Check that a network's device is not the memory that its activations would be kept in.

    Raises:
        UserError: it is a CPU.
    """
    if device.type == "cpu":
        raise UserError(
            "model.offload_activations=True on a CPU, where activations lie in main memory; allowed: false, "
            "or a GPU"
        )


def offload_activations(network: nn.Module) -> None:
    """Have the forwards of ``network`` with gradient keep their activations in main memory, in place."""
    entered: list[AbstractContextManager[Any]] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if torch.is_grad_enabled():
            entered.append(saved_tensors_hooks(_packing(module), _unpacked))
            entered[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled() and entered:
            entered.pop().__exit__(None, None, None)

    network.register_forward_pre_hook(enter)
    network.register_forward_hook(leave, always_call=True)


def _packing(network: nn.Module) -> Callable[[Tensor], Packed]:
    weights = {p.untyped_storage()._cdata for p in network.parameters() if type(p) is nn.Parameter}
    pinned = torch.cuda.is_available()

    def pack(tensor: Tensor) -> Packed:
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if not plain or tensor.untyped_storage()._cdata in weights:
            return tensor
        # Copies stand in the order of the device's own work, so neither side is read too early.
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        return tensor.device, host.copy_(tensor, non_blocking=pinned)

    return pack


def _unpacked(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=host.is_pinned())
