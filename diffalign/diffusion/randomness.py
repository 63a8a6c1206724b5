"""Randomness as an argument: a draw depends on the seed and the position in the run only.

Every group (pair, list, single sample) of a run has a global position: group g of micro-step m on rank r of W
ranks, with G groups a micro-batch, has position ``(m W + r) G + g``. Each group has its own streams, seeded
from (seed, purpose, position). Hence ranks never share noise; 8 micro-batches of 1 have the draws of 1
micro-batch of 8; two processes have the draws of one process with twice the batch; and a resumed run needs no
generator state.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffalign.types import Random


def derive(seed: int, *words: int | str) -> int:
    """Return a 63-bit seed derived from a seed and words, equal on all machines and in all processes."""
    return _seed_of(_hashed(seed, *words))


def derive_each(last: Iterable[int | str], seed: int, *words: int | str) -> list[int]:
    """Return ``derive(seed, *words, word)`` for each word of ``last``; the other words are hashed once."""
    prefix, seeds = _hashed(seed, *words, ""), []
    for word in last:
        digest = prefix.copy()
        digest.update(str(word).encode())
        seeds.append(_seed_of(digest))
    return seeds


def _hashed(seed: int, *words: int | str) -> "hashlib.blake2b":
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return hashlib.blake2b(text.encode(), digest_size=8)


def _seed_of(hashed: "hashlib.blake2b") -> int:
    return int.from_bytes(hashed.digest(), "big") >> 1


def permutation(count: int, seed: int, *words: int | str) -> Tensor:
    """Return the permutation of 0 .. count - 1 derived from a seed and words, (count,) int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, *words)))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of ``device``.

    It replaces ``torch.manual_seed``, which also queues the call, with its stack trace, for accelerators that
    are not initialised: that takes milliseconds at every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class Streams:
    """One independent random stream per group; a ``types.Random``.

    Draws are made on the CPU, so that they are equal on all accelerators; their cost is small beside a
    network call.
    """

    def __init__(self, seeds: Sequence[int]):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    @classmethod
    def at(cls, seed: int, position: int, count: int, purpose: str = "") -> "Streams":
        """Return the streams of ``count`` groups from the global ``position`` on.

        ``purpose`` ("method", "dropout", ...) separates independent uses of the same position.
        """
        return cls(derive_each(range(position, position + count), seed, purpose))

    @classmethod
    def of_groups(
        cls, seed: int, position: int, count: int, draws: Sequence[int] | None, purpose: str = ""
    ) -> "Streams":
        """Return the streams of ``count`` groups, seeded by position, or by ``draws`` of a bank if given."""
        if draws is None:
            return cls.at(seed, position, count, purpose)
        return cls([derive(seed, purpose, "bank", draw) for draw in draws])

    def uniform(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 from U[0, 1), row i from stream i; ``count`` must be the number of
        streams.
        """
        rows = torch.empty((count, *shape))
        for row, generator in zip(rows.unbind(0), self._of(count), strict=True):
            row.uniform_(generator=generator)
        return rows

    def normal(self, count: int, shape: Sequence[int] = ()) -> Tensor:
        """Return (count, *shape) float32 from N(0, 1), row i from stream i; ``count`` must be the number of
        streams.
        """
        rows = torch.empty((count, *shape))
        for row, generator in zip(rows.unbind(0), self._of(count), strict=True):
            row.normal_(generator=generator)
        return rows

    def _of(self, count: int) -> list[torch.Generator]:
        if count != len(self._generators):
            raise ValueError(
                f"{count} rows from {len(self._generators)} streams; allowed: one row per stream (group)"
            )
        return self._generators


def uniform(source: Random | torch.Generator, count: int, shape: Sequence[int] = ()) -> Tensor:
    """Return (count, *shape) draws from U[0, 1) of a ``Random`` or of a torch generator."""
    if isinstance(source, torch.Generator):
        return torch.rand((count, *shape), generator=source, device=source.device)
    return source.uniform(count, shape)


def normal(source: Random | torch.Generator, count: int, shape: Sequence[int] = ()) -> Tensor:
    """Return (count, *shape) draws from N(0, 1) of a ``Random`` or of a torch generator."""
    if isinstance(source, torch.Generator):
        return torch.randn((count, *shape), generator=source, device=source.device)
    return source.normal(count, shape)
