"""Randomness as an argument: a draw depends on (seed, position in the run) and on nothing else.

Every group (pair, list, single sample) of a run has a global position: group g of micro-step m on rank r of
W ranks, with G groups a micro-batch, stands at ``(m W + r) G + g``. It has streams of its own, seeded from
(seed, purpose, position). So ranks never share noise, 8 micro-batches of 1 draw what 1 micro-batch of 8
draws, two processes draw what one process of twice the batch draws, and a resumed run needs no generator
state: its position says everything.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffalign.types import Random


def derive(seed: int, *words: int | str) -> int:
    """Return a 63-bit seed from a seed and words; the same on every machine and in every process."""
    return _seed_of(_hashed(seed, *words))


def derive_each(last: Iterable[int | str], seed: int, *words: int | str) -> list[int]:
    """Return ``derive(seed, *words, one)`` of each last word; the other words are hashed once."""
    begun, seeds = _hashed(seed, *words, ""), []
    for one in last:
        whole = begun.copy()
        whole.update(str(one).encode())
        seeds.append(_seed_of(whole))
    return seeds


def _hashed(seed: int, *words: int | str) -> "hashlib.blake2b":
    text = "\x1f".join([str(int(seed)), *map(str, words)])
    return hashlib.blake2b(text.encode(), digest_size=8)


def _seed_of(hashed: "hashlib.blake2b") -> int:
    return int.from_bytes(hashed.digest(), "big") >> 1


def permutation(count: int, seed: int, *words: int | str) -> Tensor:
    """Return (count,) int64: the permutation that a seed and words stand for."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive(seed, *words)))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed torch's own generators of the CPU and of ``device``.

    ``torch.manual_seed`` also notes the call, with its stack trace, for each kind of accelerator that is not
    in use, which takes milliseconds; this is called at every step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


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
        return cls(derive_each(range(position, position + count), seed, purpose))

    @classmethod
    def of_groups(
        cls, seed: int, position: int, count: int, draws: Sequence[int] | None, purpose: str = ""
    ) -> "Streams":
        """Streams of ``count`` groups: of the positions from ``position`` on, or of draws of a bank."""
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
