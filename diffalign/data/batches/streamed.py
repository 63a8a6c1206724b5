"""Batches of a set that is still being encoded: the first epoch visits it block by block.

The order is a function of (seed, position), independent of the progress of the encoding: the groups of a
block follow those of the blocks before it, shuffled by (seed, block). After the last block the usual order of
the whole set (``order``) follows. A batch of a later block waits until the block is encoded.
"""

from bisect import bisect_right
from threading import RLock

import numpy as np
from torch import Tensor

from diffalign.config.schema import DataConfig
from diffalign.data.batches.order import Order
from diffalign.data.batches.source import MicroConditions, PairSource
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.encoded import EncodedSet, Record, split_holdout
from diffalign.data.encoding.stream import Stream
from diffalign.diffusion.randomness import permutation
from diffalign.errors import UserError


class StreamedSource(PairSource):
    """Endless micro-batches of one process from a stream; a ``types.Source``.

    Attributes:
        learned: groups of the first block that are trained on.
        held_out: groups of the first block that are never trained on; other groups of their prompts are not
            either.
        begun: number of groups when training began.
    """

    def __init__(
        self,
        stream: Stream,
        family: MicroConditions,
        config: DataConfig,
        batch_size: int,
        *,
        accumulation: int = 1,
        seed: int = 0,
        guided: bool = False,
    ):
        """Encode the first block.

        Raises UserError if there is no group to train on in it.
        """
        first = stream.block(0)
        if first is None or not len(first):
            raise UserError(
                "no pairs to train on: the set is empty, or data.filters leave out the whole first block; "
                "allowed: a larger data.stream_block, or 0"
            )
        learned, self.held_out = split_holdout(first, config.holdout, config.max_holdout, seed)
        self.learned = learned
        super().__init__(
            learned, family, config, batch_size, accumulation=accumulation, seed=seed, guided=guided
        )
        self.begun = len(learned)
        self._stream = stream
        self._window = batch_size * accumulation
        self._apart = set(self.held_out.records.prompts[0])
        self._parts: list[EncodedSet] = [learned]
        self._ends = [len(learned)]
        self._later: tuple[Columns, Order] | None = None
        self._shuffles: dict[int, Tensor] = {}  # of the blocks read last
        self._growing = RLock()

    @property
    def counts(self) -> str:
        """A sentence on the data used so far."""
        left = "" if self._stream.complete else ", not encoded to the end"
        return f"{self._stream.counts.text}, streamed from {self.begun} groups on{left}"

    def close(self) -> None:
        """Stop encoding and keep the encoded part."""
        self._stream.close()

    def _record(self, position: int) -> Record:
        with self._growing:
            while position >= self._ends[-1] and self._later is None:
                self._grow()
            if position >= self._ends[-1] and self._later is not None:
                records, order = self._later
                return records[order.at(position - self._ends[-1])]
            number = bisect_right(self._ends, position)
            part = self._parts[number]
            place = position - (self._ends[number] - len(part))
            return part[int(self._permutation(number)[place])]

    def _grow(self) -> None:
        """Add a block, or after the last one the order of later epochs."""
        block = self._stream.block(len(self._parts))
        if block is None:
            records = Columns.joined(part.records for part in self._parts)
            self._later = records, Order(records, self._config, self._window, self._seed)
            return
        prompts, codes = block.records.prompts
        fine = np.array([prompt not in self._apart for prompt in prompts], bool)
        learned = block.subset(np.flatnonzero(fine[codes]))
        self._parts.append(learned)
        self._ends.append(self._ends[-1] + len(learned))

    def _permutation(self, number: int) -> Tensor:
        known = self._shuffles
        if number not in known:
            while len(known) > 3:  # batches made in advance are of neighbouring blocks
                known.pop(next(iter(known)))
            known[number] = permutation(len(self._parts[number]), self._seed, "stream", number)
        return known[number]
