"""What processes tell each other beside gradients: means (a KL estimate, a running scale) and scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed


def mean_over_ranks(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Scalar mean of ``values`` (B,) over all processes, weighted by ``weight`` (B,), without gradient.

    A collective: every process must call it, whatever its batch holds. Without any weight it is 0. Where
    gradients are off (held-out batches, of which processes may hold unequally many) it is this process's own.
    """
    weight = torch.ones_like(values) if weight is None else weight
    sums = torch.stack([(values * weight).sum(), weight.sum()]).detach().double()
    if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(sums)
    return (sums[0] / sums[1].clamp(min=torch.finfo(sums.dtype).tiny)).to(values)


def gathered(value: Any) -> list[Any]:
    """``value`` of every process, in the order of their ranks; a collective. Values travel pickled, between
    processes of one run only.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


@contextmanager
def joined(world: int) -> Iterator[Callable[[], object]]:
    """While entered, a function that waits until all ``world`` processes of a torchrun have called it, days
    if need be: some draw more slowly than others.
    """
    if world == 1:
        yield lambda: None
        return
    if distributed.is_initialized():
        yield lambda: distributed.barrier()
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield lambda: distributed.barrier()
    finally:
        distributed.destroy_process_group()
