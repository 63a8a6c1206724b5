"""Weights sharded over processes by FSDP2 (torch's ``fully_shard``).

Each process holds a part of the weights and gathers those of a block while it computes the block.

Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054. Frozen and trained
weights, gradients and the optimizer's moments are sharded. The code is the same for the CPU (gloo) and for
GPUs (nccl); the mesh has the device.

``hybrid`` (HSDP) shards over the processes of one node and replicates over nodes, so that only gradients are
sent between nodes.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.config.schema import TrainingConfig
from diffalign.errors import UserError


@dataclass(frozen=True)
class Sharding:
    """Sharding of the weights of a run.

    Attributes:
        mesh: device mesh of the processes: one axis, or (nodes, processes of a node).
        reshard: whether a block's gathered weights are freed after its forward and gathered again for its
            backward (ZeRO-3); otherwise they are held until the backward (ZeRO-2).
    """

    mesh: Any
    reshard: bool = True

    def shard(self, network: nn.Module, trained: bool) -> dict[int, nn.Parameter]:
        """Shard a module's weights in place, one unit per repeated block, and move them to the mesh.

        Args:
            network: the module.
            trained: whether it has a backward pass. A module without one always frees its gathered weights
                after a forward; otherwise later updates of its parts would have no effect.

        Returns:
            The new parameters by the address (``data_ptr``) of the old parameters' data.
        """
        from torch.distributed.fsdp import fully_shard

        reshard = self.reshard or not trained
        before = {name: parameter.data_ptr() for name, parameter in network.named_parameters()}
        blocks = block_classes(network)
        for module in reversed([*network.modules()][1:]):  # inner units before those around them
            if type(module).__name__ in blocks and any(True for _ in module.parameters()):
                fully_shard(module, mesh=self.mesh, reshard_after_forward=reshard)
        fully_shard(network, mesh=self.mesh, reshard_after_forward=reshard)
        after = dict(network.named_parameters())
        return {address: after[name] for name, address in before.items()}


def sharding_of(settings: TrainingConfig, accelerator: Accelerator) -> Sharding | None:
    """Return the sharding of a run; None if each process holds all weights.

    Raises:
        UserError: ``hybrid``, and the processes do not fill nodes of equal size.
    """
    world = accelerator.num_processes
    if settings.shard == "none" or world == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    kind = accelerator.device.type
    if settings.shard == "full":
        return Sharding(init_device_mesh(kind, (world,)), settings.reshard)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % local:
        raise UserError(
            f"training.shard=hybrid: {world} processes do not fill nodes of {local}; allowed: the same "
            "number on each node, or training.shard full"
        )
    mesh = init_device_mesh(kind, (world // local, local), mesh_dim_names=("nodes", "processes"))
    return Sharding(mesh, settings.reshard)


def sharding_summary(sharding: Sharding | None, settings: TrainingConfig, network: nn.Module) -> str:
    """Return a one-line description of the sharding of a run's weights."""
    if sharding is None:
        return f"training.shard={settings.shard} with one process: nothing is sharded"
    blocks, names = block_classes(network), (type(m).__name__.removeprefix("FSDP") for m in network.modules())
    counts = Counter(name for name in names if name in blocks)
    units = ", ".join(f"{count} x {name}" for name, count in counts.items())
    size = sum(local(p).numel() * p.element_size() for p in network.parameters())
    shape = " x ".join(map(str, sharding.mesh.shape))
    return (
        f"weights sharded over {shape} processes ({settings.shard}), {size / 2**30:.3g} GiB on each; "
        f"gathered block by block: {units or 'the whole network, which declares no blocks'}"
    )


def block_classes(network: nn.Module) -> frozenset[str]:
    """Return the class names of a network's repeated blocks, as diffusers and transformers declare them."""
    class_names: set[str] = set()
    for module in network.modules():
        for attribute in ("_repeated_blocks", "_no_split_modules"):
            class_names |= set(getattr(module, attribute, None) or ())
    return frozenset(class_names)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is sharded over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, sharing its memory; other tensors as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered on all processes (a collective); other tensors are returned as is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that is equal on all processes, sharded like ``like`` and on its device."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    on_device = tensor.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients, a scalar that is equal on all processes."""
    return gathered_tensor(torch.nn.utils.get_total_norm(list(gradients)))


def free_gathered(network: nn.Module) -> None:
    """Free the gathered weights of a sharded network, so that the next gathering uses changed parts.

    It does nothing for a network that is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def assembled(network: nn.Module, keep: bool) -> Iterator[None]:
    """Within the context, a sharded network has its trained weights gathered on the CPU and its own classes.

    It can then be saved; frozen weights stay sharded. Entering is a collective operation. It does nothing for
    a network that is not sharded.

    Args:
        network: the network.
        keep: whether this process stores the gathered weights; others only take part in gathering.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded_modules = [module for module in network.modules() if isinstance(module, FSDPModule)]
    if not sharded_modules:
        yield
        return
    free_gathered(network)
    changed: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    by_id: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or not is_sharded(parameter):
                continue
            if id(parameter) not in by_id:
                gathered = gathered_tensor(parameter.detach())
                by_id[id(parameter)] = nn.Parameter(gathered.cpu() if keep else gathered.new_empty(0))
            changed.append((module._parameters, name, parameter))
    classes = [(module, type(module)) for module in sharded_modules]
    try:
        for holder, name, parameter in changed:
            holder[name] = by_id[id(parameter)]
        for module, cls in classes:
            module.__class__ = cls.__bases__[1]
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls
        for holder, name, parameter in changed:
            holder[name] = parameter
