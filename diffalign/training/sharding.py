"""Weights spread over processes by FSDP2 (torch's ``fully_shard``): each holds a part, and gathers a block's
whole weights while it computes it.

Zhao et al. 2023, arXiv 2304.11277; Rajbhandari et al. 2020 (ZeRO), arXiv 1910.02054. Frozen and trained
weights, gradients and the optimizer's moments are all spread. One path for the CPU (gloo) and for GPUs
(nccl): the mesh says which.

``hybrid`` (HSDP) spreads over the processes of one node and keeps a copy a node, so that only gradients, and
no weights, go between nodes.
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
    """How the weights of a run are spread.

    Attributes:
        mesh: of the processes: one axis, or (nodes, processes of a node).
        reshard: whether a block's gathered weights are freed after its forward and gathered again for its
            backward (ZeRO-3); False keeps them until the backward (ZeRO-2).
    """

    mesh: Any
    reshard: bool = True

    def shard(self, network: nn.Module, trained: bool) -> dict[int, nn.Parameter]:
        """Spread a module's weights in place, a unit for each repeated block, and move them to the mesh.

        Args:
            network: the module.
            trained: whether it has a backward. What has none frees its gathered weights after each forward,
                since it would otherwise never see that they have been moved.

        Returns:
            The new parameters by the address (``data_ptr``) of the old ones' data.
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
    """Return how a run's weights are spread; None where each process holds all of them.

    Raises:
        UserError: ``hybrid`` with processes that do not fill nodes of one size.
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


def words_of(sharding: Sharding | None, settings: TrainingConfig, network: nn.Module) -> str:
    """Return how a run's weights lie over its processes, in one line."""
    if sharding is None:
        return f"training.shard={settings.shard} with one process: nothing is spread"
    blocks, names = block_classes(network), (type(m).__name__.removeprefix("FSDP") for m in network.modules())
    counts = Counter(name for name in names if name in blocks)
    units = ", ".join(f"{count} x {name}" for name, count in counts.items())
    here = sum(local(p).numel() * p.element_size() for p in network.parameters())
    shape = " x ".join(map(str, sharding.mesh.shape))
    return (
        f"weights spread over {shape} processes ({settings.shard}), {here / 2**30:.3g} GiB on each; gathered "
        f"a block at a time: {units or 'the whole network, which names no blocks'}"
    )


def block_classes(network: nn.Module) -> frozenset[str]:
    """Return the names of the classes of a network's blocks, as diffusers and transformers tell them."""
    found: set[str] = set()
    for module in network.modules():
        for attribute in ("_repeated_blocks", "_no_split_modules"):
            found |= set(getattr(module, attribute, None) or ())
    return frozenset(found)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a spread tensor, sharing its memory; any other tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a spread tensor gathered, the same on every process (a collective); any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process has whole, spread as ``like`` is and on its device."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, a scalar that is the same on every process."""
    return whole(torch.nn.utils.get_total_norm(list(gradients)))


def free_gathered(network: nn.Module) -> None:
    """Free the gathered weights of a spread network: what has changed their parts must be seen when they are
    next gathered. Nothing happens to a network that is not spread.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def assembled(network: nn.Module, keep: bool) -> Iterator[None]:
    """While entered, a spread network's trained weights are whole on the CPU and its classes its own again.

    So it can be written; frozen weights stay spread. Entering is a collective. Nothing happens to a network
    that is not spread.

    Args:
        keep: whether this process wants the weights; others only help to gather them.
    """
    from torch.distributed.fsdp import FSDPModule

    spread = [module for module in network.modules() if isinstance(module, FSDPModule)]
    if not spread:
        yield
        return
    free_gathered(network)
    changed: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    done: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or not is_sharded(parameter):
                continue
            if id(parameter) not in done:
                gathered = whole(parameter.detach())
                done[id(parameter)] = nn.Parameter(gathered.cpu() if keep else gathered.new_empty(0))
            changed.append((module._parameters, name, parameter))
    classes = [(module, type(module)) for module in spread]
    try:
        for holder, name, parameter in changed:
            holder[name] = done[id(parameter)]
        for module, cls in classes:
            module.__class__ = cls.__bases__[1]
        yield
    finally:
        for module, cls in classes:
            module.__class__ = cls
        for holder, name, parameter in changed:
            holder[name] = parameter
