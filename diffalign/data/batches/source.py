"""Batches of an encoded set, in an order that does not depend on how the work is split.

The groups of a run have one endless global order; group g of micro-step m on rank r of W ranks, with G groups
a micro-batch, has position ``(m W + r) G + g``. One optimizer step is a window of ``G x accumulation x W``
positions. Order (``order``), flips, prompt dropout and posterior noise depend on (seed, position) alone. So
batch 8 x accumulation 1 is batch 1 x accumulation 8, two processes are one of twice the batch, and a resumed
run computes its place.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol, overload, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffalign.config.schema import DataConfig
from diffalign.data.batches.ahead import ahead
from diffalign.data.batches.order import Order
from diffalign.data.encoding.encoded import Bucket, EncodedSet, Record
from diffalign.diffusion import first_frame, reference_bank
from diffalign.diffusion.randomness import Streams, derive
from diffalign.diffusion.reference_bank import sample_name
from diffalign.errors import UserError
from diffalign.types import Batch


@runtime_checkable
class MicroConditions(Protocol):
    """The part of a model family that batches need: conditions made of sizes and crops."""

    def micro_conditions(
        self, original_size: Tensor, crop: Tensor, target_size: Tensor
    ) -> Mapping[str, Tensor]:
        """Return conditions from float32 (B, 2): sizes (height, width), corners (top, left), target sizes."""
        ...


@dataclass(frozen=True)
class Visit:
    """A group at one position of the run: flip and dropout of the group, noise of each image.

    ``noise`` is one standard normal tensor an image, shaped like its latents, or None for the posterior's
    mean. ``draw`` is the number of its draw of a bank (``reference_bank``), None without one.
    """

    record: Record
    flipped: bool = False
    dropped: bool = False
    noise: Sequence[Tensor] | None = None
    draw: int | None = None


def assemble(
    encoded: EncodedSet,
    family: MicroConditions,
    visits: Sequence[Visit],
    guided: bool = False,
    own_sizes: bool = False,
) -> Batch[Tensor]:
    """Return the batch of some groups of one bucket, rivals adjacent, on the CPU: x (B, C, H, W) float32, or
    of videos (B, C, F, H, W).

    ``score`` is (B,), or (B, F), one a latent frame, in a set that has dense labels.
    All images of a group have the size conditions of its first one (as in the released codes): where winners
    and losers differ in size, their own sizes would reveal the winner. With ``own_sizes`` each image has its
    own. The source of a group is a condition of each of its images; one that is the first latent frame stands
    in place of the images' own. With ``guided`` the batch has
    negative conditions; ``extra`` holds the set's data besides labels.
    """
    latents, texts, negatives, cuts, corners, group = [], [], [], [], [], []
    scores: list[list[float]] = []
    for number, visit in enumerate(visits):
        record, source = visit.record, encoded.source(visit.record, visit.flipped)
        for index, image in enumerate(record.images):
            text = encoded.empty_text(record) if visit.dropped else encoded.text(record, index)
            texts.append({**text, **source})
            negatives.append(encoded.negative_text(record) if guided else {})
            mean, std = encoded.moments(image, visit.flipped)
            latents.append(mean if visit.noise is None else mean + std * visit.noise[index])
            cut = image.cut if own_sizes else record.images[0].cut
            cuts.append(cut)
            corners.append(cut.mirrored_corner if visit.flipped else cut.corner)
            group.append(number)
            scores.append(encoded.scores(record, index))
    cond = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
    sizes = [[cut.original for cut in cuts], corners, [cut.target for cut in cuts]]
    cond |= family.micro_conditions(*(torch.tensor(pairs, dtype=torch.float32) for pairs in sizes))
    draws = [visit.draw for visit in visits if visit.draw is not None]
    if draws:
        names = [sample_name(v.draw or 0, i) for v in visits for i in range(len(v.record.images))]
        cond[reference_bank.NAME] = torch.tensor(names)
    score = torch.tensor(scores, dtype=torch.float32)
    return Batch(
        first_frame.clean(torch.stack(latents), cond),
        cond,
        torch.tensor(group),
        score if encoded.dense else score[:, 0],
        {name: torch.stack([negative[name] for negative in negatives]) for name in negatives[0]},
        _extra(encoded, visits),
        draws=draws or None,
    )


def _extra(encoded: EncodedSet, visits: Sequence[Visit]) -> dict[str, Tensor]:
    """``reward`` (B,), or (B, R) of several; ``patches`` (B, 1, H, W); ``weight`` (B,), the group's;
    ``votes`` (B,), the share of people who preferred the image, NaN in a group without votes; ``time_labels``
    (B, A), 1 in a group without any.
    """
    extra: dict[str, Tensor] = {}
    images = [(visit, index) for visit in visits for index in range(len(visit.record.images))]
    if "reward" in encoded.extras:
        rewards = torch.tensor([visit.record.rewards[index] for visit, index in images], dtype=torch.float32)
        extra["reward"] = rewards[:, 0] if rewards.shape[1] == 1 else rewards
    if "patches" in encoded.extras:
        maps = [encoded.weights(visit.record, index, visit.flipped) for visit, index in images]
        extra["patches"] = torch.stack(maps)
    if "weight" in encoded.extras:
        extra["weight"] = torch.tensor([visit.record.weight for visit, _ in images], dtype=torch.float32)
    if "votes" in encoded.extras:
        votes = [visit.record.votes[index] if visit.record.votes else math.nan for visit, index in images]
        extra["votes"] = torch.tensor(votes, dtype=torch.float32)
    if "time_labels" in encoded.extras:
        everywhere = (1,) * encoded.records.intervals
        labels = [visit.record.time_labels or everywhere for visit, _ in images]
        extra["time_labels"] = torch.tensor(labels, dtype=torch.float32)
    return extra


class PairSource:
    """Endless micro-batches of one rank; a ``types.Source``."""

    def __init__(
        self,
        encoded: EncodedSet,
        family: MicroConditions,
        config: DataConfig,
        batch_size: int,
        *,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        guided: bool = False,
    ):
        """``guided`` batches have negative conditions.

        Raises a UserError if there is no group to train on, or if the curriculum does not fit the set.
        """
        if not len(encoded):
            raise UserError("no pairs to train on: the set is empty, or data.holdout keeps all of them")
        self._encoded = encoded
        self._family = family
        self._config = config
        self._batch_size = batch_size
        self._rank = rank
        self._world = world
        self._seed = seed
        self._guided = guided
        self._order = Order(encoded.records, config, batch_size * accumulation * world, seed)
        self._start = 0
        encoded.records.release()

    def seek(self, micro_step: int) -> None:
        """Let the next iterator begin after ``micro_step`` micro-batches."""
        self._start = micro_step

    def __iter__(self) -> Iterator[Batch[Tensor]]:
        if not self._config.workers:
            return ahead(self.batch, count(self._start), self._config.prefetch)
        # its own generator: otherwise the loader draws a seed from the global one
        return iter(
            DataLoader(
                _Steps(self, self._start),
                batch_size=None,
                num_workers=self._config.workers,
                generator=torch.Generator(),
            )
        )

    def batch(self, micro_step: int) -> Batch[Tensor]:
        """Return the micro-batch of one micro-step of this rank."""
        first = (micro_step * self._world + self._rank) * self._batch_size
        visits = [self._visit(position) for position in range(first, first + self._batch_size)]
        own_sizes = self._config.own_sizes
        return assemble(self._encoded, self._family, visits, self._guided, own_sizes)

    def _record(self, position: int) -> Record:
        return self._encoded[self._order.at(position)]

    def _draw(self, position: int) -> int | None:
        """Return the draw of a bank that a position takes for its group; None without a bank."""
        size = self._config.reference_bank
        if not size:
            return None
        return self._order.at(position) * size + derive(self._seed, "data/bank", position) % size

    def _visit(self, position: int) -> Visit:
        record, number = self._record(position), self._draw(position)
        draws = None if number is None else [number]
        draw = lambda purpose: Streams.of_groups(self._seed, position, 1, draws, purpose)  # noqa: E731
        flipped = self._config.flip and bool(draw("data/flip").uniform(1) < 0.5)
        dropped = bool(draw("data/prompt").uniform(1) < self._config.prompt_dropout)
        dropped = dropped and not record.texts  # two captions that are both dropped have nothing to compare
        noise = (
            _noise(self._encoded, record, draw("data/posterior"))
            if self._config.posterior == "sample"
            else None
        )
        return Visit(record, flipped, dropped, noise, number)


class FixedBatches(Sequence[Batch[Tensor]]):
    """The batches of ``fixed_batches``, each made at its iteration and not kept."""

    def __init__(
        self,
        encoded: EncodedSet,
        family: MicroConditions,
        config: DataConfig,
        batch_size: int,
        seed: int = 0,
        guided: bool = False,
    ):
        """See ``fixed_batches``."""
        self._encoded, self._family, self._config = encoded, family, config
        self._seed, self._guided = seed, guided
        buckets: dict[Bucket, list[int]] = {}
        for index, record in enumerate(encoded):
            buckets.setdefault(record.bucket, []).append(index)
        self._indices = [
            buckets[bucket][first : first + batch_size]
            for bucket in sorted(buckets)
            for first in range(0, len(buckets[bucket]), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, number: int) -> Batch[Tensor]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Batch[Tensor]]: ...
    def __getitem__(self, number: int | slice) -> Batch[Tensor] | Sequence[Batch[Tensor]]:
        """Return a batch, or a list of them."""
        if isinstance(number, slice):
            return [self[at] for at in range(len(self))[number]]
        visits = []
        for index in self._indices[number]:
            record = self._encoded[index]
            draws = Streams.at(self._seed, index, 1, "data/fixed posterior")
            noise = _noise(self._encoded, record, draws) if self._config.posterior == "sample" else None
            visits.append(Visit(record, noise=noise))
        own_sizes = self._config.own_sizes
        return assemble(self._encoded, self._family, visits, self._guided, own_sizes)


def fixed_batches(
    encoded: EncodedSet,
    family: MicroConditions,
    config: DataConfig,
    batch_size: int,
    seed: int = 0,
    guided: bool = False,
) -> Iterator[Batch[Tensor]]:
    """Return batches of every group once, equal at each call, without flips and dropout: for diagnostics on
    held-out pairs.

    Batches hold at most ``batch_size`` groups of one bucket, buckets one after the other.
    """
    return iter(FixedBatches(encoded, family, config, batch_size, seed, guided))


def _noise(encoded: EncodedSet, record: Record, streams: Streams) -> list[Tensor]:
    shape = encoded.moments(record.images[0])[0].shape
    return list(streams.normal(1, (len(record.images), *shape))[0])


class _Steps(IterableDataset[Batch[Tensor]]):
    """A source for a data loader: each of n workers makes every n-th micro-batch."""

    def __init__(self, source: PairSource, start: int):
        self._source = source
        self._start = start

    def __iter__(self) -> Iterator[Batch[Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self._source.batch, count(self._start + first, step))
