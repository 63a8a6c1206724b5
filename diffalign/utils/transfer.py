"""Copies from main memory to an accelerator, for which the host does not wait.

``tensor.to(device)`` of a tensor in main memory ends by waiting until the GPU has done all that was queued
before; a training step that makes ten such copies of indices, times and noise stops the host ten times.
``non_blocking`` copies from pinned memory do not wait, and small ones from any memory are staged at once
(CUDA Runtime API, "API synchronization behavior").
"""

import torch
from torch import Tensor

STAGED = 64 * 1024
"""Bytes up to which a copy from memory that is not pinned is staged at once."""


def sent(tensor: Tensor, to: Tensor | torch.device | str) -> Tensor:
    """Return ``tensor.to(to)``: on a device, or with the device and the dtype of another tensor.

    The host waits only where the result is in main memory, which it may read at once.
    """
    device = to.device if isinstance(to, Tensor) else torch.device(to)
    if device.type == "cpu":
        return tensor.to(to)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > STAGED:
        tensor = tensor.pin_memory()
    return tensor.to(to, non_blocking=True)
