"""Reading ahead: batches are made by threads while the step before them runs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from weakref import finalize

import torch
from torch import Tensor

from diffalign.types import Batch

THREADS = 2


class ahead(Iterator[Batch[Tensor]]):  # noqa: N801 (used as a function, like map)
    """Return ``map(make, numbers)`` with up to ``depth`` batches made in advance, in pinned memory beside a
    GPU.

    The order is that of ``numbers``; ``make`` must depend on its number alone and be thread-safe. An error of
    ``make`` is raised in place of its batch. The threads end with the iterator.
    """

    def __init__(self, make: Callable[[int], Batch[Tensor]], numbers: Iterable[int], depth: int):
        self._make, self._numbers, self._depth = make, iter(numbers), depth
        self._waiting: deque[Future[Batch[Tensor]]] = deque()
        self._pool = ThreadPoolExecutor(min(THREADS, depth), "diffalign-read") if depth else None
        self._pin = torch.cuda.is_available()
        if self._pool is not None:
            finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def __next__(self) -> Batch[Tensor]:
        if self._pool is None:
            return self._make(next(self._numbers))
        while len(self._waiting) <= self._depth:
            number = next(self._numbers, None)
            if number is None:
                break
            self._waiting.append(self._pool.submit(_made, self._make, number, self._pin))
        if not self._waiting:
            raise StopIteration
        return self._waiting.popleft().result()


def _made(make: Callable[[int], Batch[Tensor]], number: int, pin: bool) -> Batch[Tensor]:
    batch = make(number)
    return _pinned(batch) if pin else batch


def _pinned(batch: Batch[Tensor]) -> Batch[Tensor]:
    """Return the batch in page-locked memory, from which copies to a GPU overlap with its work."""

    def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}

    return replace(
        batch,
        x=batch.x.pin_memory(),
        cond=named(batch.cond),
        score=batch.score.pin_memory(),
        negative=named(batch.negative),
        extra=named(batch.extra),
    )
