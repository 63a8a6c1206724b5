"""A source over tensors in memory: for the plane, for tests, for any set that fits."""

from collections.abc import Iterator, Mapping
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.randomness import permutation
from diffalign.errors import UserError
from diffalign.types import Batch


class TensorSource:
    """Endless batches of groups of K rivals, shuffled anew in each epoch by (seed, epoch).

    Group g of micro-step m on rank r of W ranks with G groups a micro-batch is number ``(m W + r) G + g`` of
    the run's one order, so that any split over micro-steps and ranks visits the same groups.
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
            negative: what guidance guides away from, each (N, K, ...).
            extra: what only some methods ask for, each (N, K, ...).
            batch_size: groups a micro-batch.
            rank: of this process.
            world: how many processes there are.
            seed: of the order.
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
        """Continue as if ``micro_step`` micro-batches had been drawn."""
        self._micro_step = micro_step

    def __iter__(self) -> Iterator[Batch[Tensor]]:
        """Endless micro-batches, from where ``seek`` has put it."""
        while True:
            batch = self.batch(self._micro_step)
            self._micro_step += 1
            yield batch

    def batch(self, micro_step: int) -> Batch[Tensor]:
        """Return the micro-batch of one micro-step: x (G K, *d), rivals side by side."""
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
