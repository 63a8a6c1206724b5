"""A source over tensors in memory, for the plane, tests and small sets."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.randomness import permutation
from diffalign.errors import UserError
from diffalign.types import Batch


class TensorSource:
    """Endless batches of groups of K rivals, shuffled in each epoch by (seed, epoch).

    With W ranks and G groups a micro-batch, group g of micro-step m on rank r is number ``(m W + r) G + g``
    of one global order, so any split over micro-steps and ranks visits the same groups.
    """

    def __init__(
        self,
        x: Float[Tensor, "N K *d"],
        score: Float[Tensor, "N K *unit"],
        cond: Mapping[str, Tensor] | None = None,
        *,
        negative: Mapping[str, Tensor] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
    ):
        """Hold a set of N groups.

        Args:
            x: (N, K, *d) clean latents.
            score: (N, K, *unit), higher is better.
            cond: conditions, each (N, K, ...).
            negative: negative conditions of guidance, each (N, K, ...).
            extra: tensors that only some methods need, each (N, K, ...).
            batch_size: groups a micro-batch.
            rank: rank of this process.
            world: number of processes.
            seed: seed of the order.

        Raises:
            UserError: the set is empty.
        """
        if not len(x):
            raise UserError("the set is empty: there is nothing to train on")
        self._x, self._score, self._cond = x, score, dict(cond or {})
        self._negative, self._extra = dict(negative or {}), dict(extra or {})
        self._groups, self._rank, self._world = batch_size, rank, world
        self._micro_step = 0
        count = len(x)

        @lru_cache(maxsize=4)
        def order(epoch: int) -> Tensor:
            return permutation(count, seed, "order", epoch)

        self._order = order

    def seek(self, micro_step: int) -> None:
        """Continue iteration at micro-step ``micro_step``."""
        self._micro_step = micro_step

    def __iter__(self) -> Iterator[Batch[Tensor]]:
        """Yield micro-batches without end, from the position that ``seek`` set."""
        while True:
            batch = self.batch(self._micro_step)
            self._micro_step += 1
            yield batch

    def batch(self, micro_step: int) -> Batch[Tensor]:
        """Return the micro-batch of one micro-step: x (G K, *d), with contiguous rivals."""
        count = len(self._x)
        first = (micro_step * self._world + self._rank) * self._groups
        end = first + self._groups
        epochs = range(first // count, (end - 1) // count + 1)
        chosen = torch.cat([self._order(e)[max(first - e * count, 0) : end - e * count] for e in epochs])

        def pick(tensor: Tensor) -> Tensor:
            return tensor[chosen].flatten(0, 1)

        def named(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: pick(value) for name, value in tensors.items()}

        return Batch(
            x=pick(self._x),
            cond=named(self._cond),
            group=torch.arange(self._groups).repeat_interleave(self._x.shape[1]),
            score=pick(self._score),
            negative=named(self._negative),
            extra=named(self._extra),
        )
