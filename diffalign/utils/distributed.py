"""Collectives other than those of gradients: means (a KL estimate, a running scale), gathers, barriers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from diffalign.utils.devices import check_group


def mean_over_ranks(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the weighted mean of ``values`` (B,) over all processes, a scalar without gradient.

    This is a collective: every process must call it. If all weights are 0, the mean is 0. Where gradients are
    disabled (held-out batches, whose number may differ between processes) the mean is local to the process.
    """
    weight = torch.ones_like(values) if weight is None else weight
    sums = torch.stack([(values * weight).sum(), weight.sum()]).detach().double()
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)).to(values)


def gathered(value: Any) -> list[Any]:
    """Return the ``value`` of every process, in the order of ranks; a collective.

    Values are pickled, and exchanged between the processes of one run only.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


@contextmanager
def joined(world: int) -> Iterator[Callable[[], object]]:
    """Yield a barrier of the ``world`` processes of a torchrun, starting a process group if there is none.

    The timeout is 30 days, since processes may sample at very different speeds.

    Raises:
        UserError: the processes cannot find each other.
    """
    if world == 1:
        yield lambda: None
        return
    if distributed.is_initialized():
        yield lambda: distributed.barrier()
        return
    check_group()
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield lambda: distributed.barrier()
    finally:
        distributed.destroy_process_group()
