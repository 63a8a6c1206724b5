"""A set in blocks of groups, each encoded when it is first needed.

A block is a number of consecutive groups of the set, independent of the state of the cache: a complete, a
partial and an empty one give the same blocks.
"""

from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from threading import RLock

import torch

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.columns import Columns
from diffalign.data.encoding.encode import MEMORY, completed, encode_share, merge, set_name
from diffalign.data.encoding.encoded import EncodedSet, Shared, read_manifest
from diffalign.data.encoding.filters import filtered
from diffalign.data.encoding.rating import Rater
from diffalign.data.encoding.records import Record
from diffalign.data.encoding.store import Memory, Store
from diffalign.data.encoding.writer import Encoders, Writer
from diffalign.data.reading.examples import Counts, Preferences
from diffalign.errors import UserError

_OF_GROUPS = (
    *("usable", "ties", "lists", "captions", "liked", "disliked"),
    *("segments", "tied", "missing", "beyond"),
)


class Stream:
    """Blocks of ``config.stream_block`` groups, without those that ``config.filters`` leave out.

    Threads may share it.

    Attributes:
        complete: whether all of the set is encoded.
    """

    def __init__(
        self,
        model: Encoders,
        preferences: Preferences,
        config: DataConfig,
        cache_dir: Path | str,
        *,
        half: bool = False,
        rater: Rater | None = None,
        finished: Callable[[Counts], None] = lambda counts: None,
    ):
        """Prepare the stream without encoding; arguments as ``encode_preferences``.

        ``finished`` gets the counts of the whole set once all of it is encoded.
        """
        self.complete = False
        self._whole = Counts()
        self._finished = finished
        self._error: BaseException | None = None
        self._model, self._preferences, self._config = model, preferences, config
        self._store, self._half, self._rater = Store(cache_dir), half, rater
        self._blocks: list[EncodedSet] = []
        self._rest = self._encoding()
        self._lock = RLock()

    def block(self, number: int) -> EncodedSet | None:
        """Return a block, which is encoded if needed; None after the last one.

        Raises a UserError if its groups differ from those of the first block in size, number of frames, or
        kinds of data besides labels.
        """
        with self._lock:
            while len(self._blocks) <= number and not self.complete:
                if self._error is not None:  # an error of an advance thread: the set has not ended
                    raise self._error
                try:
                    fresh = next(self._rest, None)
                    if fresh is not None:
                        self._blocks.append(self._alike(filtered(fresh, self._config.filters)))
                except BaseException as error:
                    self._error = error
                    raise
                if fresh is None:
                    self.complete = True
                    self._finished(self.counts)
            return self._blocks[number] if number < len(self._blocks) else None

    @property
    def counts(self) -> Counts:
        """Of the groups that are encoded, and once all are, of the rows that were dropped."""
        blocks = [block.counts for block in self._blocks]
        summed = {name: sum(getattr(counts, name) for counts in blocks) for name in _OF_GROUPS}
        removed: Counter[str] = Counter()
        for counts in blocks:
            removed.update(dict(counts.filtered))
        return replace(self._whole, **summed, filtered=tuple(removed.items()))

    def close(self) -> None:
        """Stop encoding and keep the encoded part."""
        with self._lock:
            self._rest.close()

    def _encoding(self) -> Generator[EncodedSet, None, None]:
        store, config, half = self._store, self._config, self._half
        memory = Memory(store, MEMORY)
        name = set_name(self._model, self._preferences, config, half, self._rater)
        manifest = f"manifests/{name}.arrow"
        known = read_manifest(store.files, manifest, memory) if self._preferences.fingerprint else None
        if known is not None:
            self._whole = known.counts
            for first in range(0, len(known), config.stream_block):
                last = min(first + config.stream_block, len(known))
                yield known.holding(known.records.take(range(first, last)))
            return
        store.salvage()
        writer = Writer(self._model, store, config.cache_batch_size, torch.float16 if half else torch.float32)
        with completed(store, writer):
            shared = Shared(writer.text(""), writer.negative())
            parts = [f"manifests/parts/{name}.0-of-1.arrow"]
            waiting: list[Record] = []
            for written in encode_share(
                self._preferences, config, writer, parts, rank=0, progress=False, rater=self._rater
            ):
                waiting += [written] if isinstance(written, Record) else []
                if len(waiting) == config.stream_block:
                    writer.flush()
                    store.seal()
                    yield EncodedSet(Columns.of(waiting), shared, Counts(), memory).recounted()
                    waiting = []
            store.seal()
            self._whole = merge(store, manifest, parts, shared, memory, 0).counts
        if waiting:
            yield EncodedSet(Columns.of(waiting), shared, Counts(), memory).recounted()

    def _alike(self, block: EncodedSet) -> EncodedSet:
        """Check that a block fits into batches with the groups of earlier ones."""
        full = [other for other in self._blocks if len(other)][:1]
        for other in [*full, block] if len(block) else []:
            what = (
                "sizes or numbers of frames"
                if len({*block.records.bucket_codes[0], *other.records.bucket_codes[0]}) > 1
                else "labels in time"
                if block.dense != other.dense
                else "rewards, votes, weights or maps"
                if block.extras != other.extras
                else "their source image, which some have"
                if len({*block.records.has_source, *other.records.has_source}) > 1
                else ""
            )
            if what:
                raise UserError(
                    f"data.stream_block={self._config.stream_block}: {block[0].where} and the next "
                    f"{len(block) - 1} groups differ in {what} from earlier ones or among themselves; "
                    "allowed: 0, which sees the whole set before it trains"
                )
        return block
