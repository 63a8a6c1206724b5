"""Randomness as an argument: a draw depends on (seed, position in the run) and on nothing else.

Every group (pair, list, single sample) of a run has a global position: group g of micro-step m on rank r of
W ranks, with G groups a micro-batch, stands at ``(m W + r) G + g``. It has streams of its own, seeded from
(seed, purpose, position). So ranks never share noise, 8 micro-batches of 1 draw what 1 micro-batch of 8
draws, two processes draw what one process of twice the batch draws, and a resumed run needs no generator
state: its position says everything.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.types import Random


def derive(seed: int, *words: int | str) -> int:
    """Return a 63-bit seed from a seed and words; the same on every machine and in every process."""
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(count: int, seed: int, *words: int | str) -> Tensor:
    """Return (count,) int64: the permutation that a seed and words stand for."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, *words)))


class Streams:
    """One independent random stream per group; a ``types.Random``.

    Draws are made on the CPU: they are small beside a network call, and then the same on every accelerator.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def at(cls, seed: int, position: int, count: int, purpose: str = "") -> "Streams":
        """Streams of the ``count`` groups from the global ``position`` on, for one purpose ("method",
        "dropout", ...).
        """
        return cls([derive(seed, purpose, position + i) for i in range(count)])

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 from U[0, 1), row i from stream i; ``count`` must be the number of
        streams.
        """
        return torch.stack([torch.rand(tuple(shape), generator=g) for g in self._of(count)])

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 from N(0, 1), row i from stream i; ``count`` must be the number of
        streams.
        """
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._of(count)])

    def _of(self, count: int) -> list[torch.Generator]:
        if count != len(self._generators):
            raise ValueError(
                f"{count} rows from {len(self._generators)} streams: there is one stream per group"
            )
        return self._generators


def uniform(source: Random | torch.Generator, count: int, shape: Sequence[int] = ()) -> Tensor:
    """Return (count, *shape) draws from U[0, 1) of streams or of one plain generator."""
    if isinstance(source, torch.Generator):
        return torch.rand((count, *shape), generator=source, device=source.device)
    return source.uniform(count, shape)


def normal(source: Random | torch.Generator, count: int, shape: Sequence[int] = ()) -> Tensor:
    """Return (count, *shape) draws from N(0, 1) of streams or of one plain generator."""
    if isinstance(source, torch.Generator):
        return torch.randn((count, *shape), generator=source, device=source.device)
    return source.normal(count, shape)
