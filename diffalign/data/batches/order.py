"""The order of groups in a run: the group at a position depends on (seed, position) alone.

One optimizer step is a window of positions. A window reads from one bucket of equal size (and number of
frames), drawn in proportion to the buckets' sizes; each bucket is an endless row of reshuffled epochs. Single
likes have the configured share: of every hundred positions of a bucket so many are likes, at shuffled places.
Each stage of a curriculum has its own order.
"""

from bisect import bisect_right
from collections import Counter
from threading import Lock

import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from diffalign.config.schema import CurriculumConfig, DataConfig
from diffalign.data.encoding.columns import Columns
from diffalign.diffusion.randomness import derive, permutation
from diffalign.errors import UserError

_BLOCK = 100  # positions in which the share of likes is exact


class Order:
    """The one order of a run's groups."""

    def __init__(self, records: Columns, config: DataConfig, window: int, seed: int):
        """Raise a UserError if the curriculum does not fit the records."""
        self._length = config.curriculum.steps * window
        self._members: list[np.ndarray] = [np.arange(len(records))]
        seeds = [seed]
        if config.curriculum.stages:
            self._members = stages(records, config.curriculum)
            seeds = [derive(seed, "stage", number) for number in range(len(self._members))]
        self._shuffles = [
            _Shuffle(records.take(members), config.likes_share, window, own)
            for members, own in zip(self._members, seeds, strict=True)
        ]

    def at(self, position: int) -> int:
        """Return the index of the group at a position."""
        stage = min(position // self._length, len(self._members) - 1) if self._length else 0
        return int(self._members[stage][self._shuffles[stage].at(position - stage * self._length)])


class _Shuffle:
    """Endless reshuffled epochs of some groups, a bucket at a time."""

    def __init__(self, records: Columns, likes_share: float | None, window: int, seed: int):
        buckets, codes = records.bucket_codes
        by_bucket = np.argsort(codes, kind="stable")
        ends = np.cumsum(np.bincount(codes, minlength=len(buckets)))
        self._buckets = np.split(by_bucket, ends[:-1])
        self._ends: list[int] = ends.tolist()
        self._window = window
        self._seed = seed
        self._windows: list[tuple[int, int]] = []  # (bucket, earlier windows of that bucket)
        self._used = [0] * len(buckets)
        self._permutations: dict[tuple[str, ...], tuple[int, Tensor]] = {}  # name -> (number, permutation)
        self._share = likes_share if (records.sizes == 1).all() else None
        liked = records.first_scores > 0
        self._sides = (
            [[bucket[liked[bucket] == side] for side in (False, True)] for bucket in self._buckets]
            if self._share is not None
            else []
        )
        self._lock = Lock()  # threads that make batches in advance share the windows and permutations

    def at(self, position: int) -> int:
        """Return the index of the group at a position."""
        with self._lock:
            return self._at(position)

    def _at(self, position: int) -> int:
        window, offset = divmod(position, self._window)
        bucket, earlier = self._bucket(window)
        place = earlier * self._window + offset  # in the endless order of this bucket
        if self._share is not None and all(map(len, self._sides[bucket])):
            side, place = self._side(bucket, place, self._share)
            return self._member(self._sides[bucket][side], place, "shuffle", str(bucket), str(side))
        return self._member(self._buckets[bucket], place, "shuffle", str(bucket))

    def _member(self, members: np.ndarray, place: int, *name: str) -> int:
        epoch, slot = divmod(place, len(members))
        return int(members[int(self._permutation(len(members), epoch, *name)[slot])])

    def _side(self, bucket: int, place: int, share: float) -> tuple[int, int]:
        """(1 for a like, how many of its side came before) of a place of a bucket."""
        block, offset = divmod(place, _BLOCK)
        before, after = round(block * _BLOCK * share), round((block + 1) * _BLOCK * share)
        is_like = self._permutation(_BLOCK, block, "likes", str(bucket)) < after - before
        earlier = int(is_like[:offset].sum())
        if is_like[offset]:
            return 1, before + earlier
        return 0, block * _BLOCK - before + offset - earlier

    def _bucket(self, window: int) -> tuple[int, int]:
        if len(self._buckets) == 1:
            return 0, window
        while len(self._windows) <= window:
            draw = derive(self._seed, "bucket", len(self._windows)) % self._ends[-1]
            bucket = bisect_right(self._ends, draw)
            self._windows.append((bucket, self._used[bucket]))
            self._used[bucket] += 1
        return self._windows[window]

    def _permutation(self, count: int, number: int, *name: str) -> Tensor:
        """Return the permutation of ``count`` of that name and number; the last of each name is kept."""
        known = self._permutations.get(name)
        if known is None or known[0] != number:
            known = (number, permutation(count, self._seed, *name, number))
            self._permutations[name] = known
        return known[1]


def lengths(records: Columns) -> str:
    """Return the counts of groups by number of frames: ``frames: 81 (9980), 49 (20)``; empty for images."""
    counted = Counter(records.buckets[:, 2].tolist())
    if not any(counted):
        return ""
    return "frames: " + ", ".join(f"{frames} ({counted[frames]})" for frames in sorted(counted, reverse=True))


def scarce(records: Columns, window: int) -> str:
    """Return the buckets that have fewer groups than a window has positions, of several buckets: ``20 of
    480 x 832 pixels, 49 frames``; nothing where there are none, or where all groups fit together.
    """
    buckets, codes = records.bucket_codes
    counted = dict(zip(buckets, np.bincount(codes, minlength=len(buckets)).tolist(), strict=True))
    if len(counted) < 2:
        return ""
    return "; ".join(
        f"{groups} of {height} x {width} pixels" + (f", {frames} frames" if frames else "")
        for (height, width, frames), groups in sorted(counted.items())
        if groups < window
    )


def stages(records: Columns, config: CurriculumConfig) -> list[np.ndarray]:
    """Return the indices of each stage: groups whose gap reaches the stage's threshold.

    The thresholds decrease evenly from the widest gap to the narrowest that is used (Curriculum-DPO, Croitoru
    et al. 2025, released code); without ``cumulative`` a stage has only what the earlier ones had not
    (Curry-DPO). Ties are in no stage.

    Raises UserError if groups have no rivals or no reward, or if a stage would be empty.
    """
    found = gaps(records, config)
    used = found[(found > 0) & (found >= config.min_gap)]
    if not len(used):
        raise UserError(
            f"data.curriculum.min_gap is {config.min_gap}; allowed: at most the widest gap, "
            f"{found.max(initial=0.0):g}, and one above 0"
        )
    widest, narrowest, n = float(used.max()), float(used.min()), config.stages
    floors = [*(widest + (narrowest - widest) * stage / n for stage in range(1, n)), narrowest]
    chosen: list[np.ndarray] = []
    for stage, floor in enumerate(floors):
        ceiling = floors[stage - 1] if stage and not config.cumulative else float("inf")
        chosen.append(np.flatnonzero((floor <= found) & (found < ceiling)))
        if not len(chosen[-1]):
            raise UserError(
                f"data.curriculum.stages is {n}, but stage {stage + 1} has no group: no gap from {floor:g} "
                f"to {ceiling:g}; allowed: fewer stages, or data.curriculum.cumulative"
            )
    return chosen


def gaps(records: Columns, config: CurriculumConfig) -> np.ndarray:
    """Return (n,) the gap between the best and the worst of each group, by score or by the mean of its
    rewards.
    """
    if len(alone := np.flatnonzero(records.sizes < 2)):
        raise UserError(
            f"{records[int(alone[0])].where}: data.curriculum.stages is {config.stages}, but the image has "
            "no rival; allowed: 0 for single images"
        )
    if config.by == "score":
        return records.spreads
    counts = records.reward_counts
    if len(missing := np.flatnonzero(counts == 0)):
        raise UserError(
            f"{records[int(missing[0])].where}: data.curriculum.by is 'reward', but there is no reward; "
            "name one in data.rewards, or give the set a column rewards"
        )
    values = pc.list_flatten(pc.list_flatten(records.column("rewards"))).to_numpy()
    of_images = np.repeat(counts, records.sizes)
    means = np.add.reduceat(values, np.cumsum(of_images) - of_images) / of_images
    spread = np.maximum.reduceat(means, records.starts) - np.minimum.reduceat(means, records.starts)
    return np.where(records.kinds == "tie", 0.0, spread)
