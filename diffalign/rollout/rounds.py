"""A round: the scored samples that one process learns from, and which micro-step learns from which of them.

Groups of a run have one endless order, as those of a preference set (``data.batches.source``): group g of
micro-step m on rank r of W ranks, G groups a micro-batch, has position ``(m W + r) G + g``. Within a round of
N prompts a rank the order is slot by slot and, in a slot, prompt by prompt, so a prompt's slots are spread
over the round; each prompt's slots are shuffled. So any split of a round over micro-batches and ranks trains
on the same groups in the same step, and a resumed run computes its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffalign.diffusion.randomness import permutation
from diffalign.errors import UserError
from diffalign.losses.contrast import pareto
from diffalign.types import Batch, Cond, Kernel, Transition


@dataclass(frozen=True)
class Place:
    """The groups of a micro-step: ``rows`` (first, last) of the rank's prompts, at their ``slot``-th
    visit."""

    round: int
    rows: tuple[int, int]
    slot: int


class PromptOrder:
    """The prompts of an online run by position: every epoch has an order of its own, from (seed, epoch)."""

    def __init__(self, prompts: Sequence[str], seed: int):
        self._prompts, self._seed = list(prompts), seed
        self._epoch, self._places = -1, torch.empty(0)

    def __getitem__(self, position: int) -> str:
        """Return the prompt at a position of the run."""
        epoch, index = divmod(position, len(self._prompts))
        if self._epoch != epoch:
            self._epoch = epoch
            self._places = permutation(len(self._prompts), self._seed, "rollout/order", epoch)
        return self._prompts[int(self._places[index])]


@dataclass(frozen=True)
class Plan:
    """The split of rounds into micro-steps.

    Attributes:
        prompts: N, per rank and round.
        slots: S, of each prompt.
        batch_size: G, groups a micro-batch.
        passes: epochs over a round.
        rank: of this process.
        world: W.
    """

    prompts: int
    slots: int
    batch_size: int
    passes: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.prompts % self.batch_size:
            raise UserError(
                f"rollout.prompts_per_round={self.prompts}; allowed: a multiple of "
                f"training.batch_size={self.batch_size}"
            )

    @property
    def micro_steps(self) -> int:
        """Micro-batches of a round."""
        return self.prompts // self.batch_size * self.slots * self.passes

    def place(self, micro_step: int) -> Place:
        """Return the groups of a micro-step of this rank."""
        number, within = divmod(micro_step, self.micro_steps)
        visit, chunk = divmod(within, self.prompts // self.batch_size)
        return Place(number, (chunk * self.batch_size, (chunk + 1) * self.batch_size), visit % self.slots)

    def position(self, number: int, row: int) -> int:
        """Return the place of this rank's prompt ``row`` of round ``number`` in the run's one order of
        prompts.
        """
        chunk, within = divmod(row, self.batch_size)
        return (number * self.prompts + chunk * self.batch_size) * self.world + (
            self.rank * self.batch_size + within
        )


@dataclass(frozen=True)
class Round:
    """N prompts of one rank, S slots of K rivals each, on the CPU.

    Attributes:
        x: latents (N, S, K, *d), or transitions, every tensor (N, S, K, ...).
        cond: conditions, (N, ...).
        negative: conditions that guidance guides away from, (N, ...).
        score: (N, S, K), or (N, S, K, R) for Pareto comparisons.
        shared: (N, S) whether the rivals of a slot share x_t.
        extra: by name, every tensor (N, S, K, ...).
        order: (N, S) the slots of each prompt in their shuffled order.
        kernel: of the transitions.
        guidance: scale that the transitions were drawn with.
        grid: (T + 1,) the sampler's times.
        taught: whether a teacher gives a mean for every slot, whatever the scores.
    """

    x: Tensor | Transition
    cond: Cond
    negative: Cond
    score: Tensor
    shared: Tensor
    order: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    kernel: Kernel | None = None
    guidance: float = 1.0
    grid: Tensor | None = None
    taught: bool = False

    @cached_property
    def useful(self) -> Tensor:
        """(N, S) whether a slot has a gradient: not all rivals are tied, or an advantage is not 0."""
        if self.taught:
            return torch.ones_like(self.order, dtype=torch.bool)
        if "advantage" in self.extra:
            return self.extra["advantage"].ne(0).any(-1)
        if self.score.ndim == 3:
            return self.score.ne(self.score[:, :, :1]).any(-1)
        n, s, k, _ = self.score.shape
        one, other = (index.flatten() for index in torch.triu_indices(k, k, 1).split(1))
        leads = pareto(self.score[:, :, one].flatten(0, 2), self.score[:, :, other].flatten(0, 2))
        return leads.reshape(n, s, -1).ne(0).any(-1)

    def batch(self, place: Place) -> Batch[Any]:
        """Return the groups of a place.

        Of transitions only the groups that have a gradient are returned, the first one if none has. No noise
        is drawn for transitions, so leaving groups out does not change the others.
        """
        rows = torch.arange(*place.rows)
        slots = self.order[rows, place.slot]
        if self.kernel is not None:
            kept = self.useful[rows, slots]
            if not bool(kept.any()):
                kept[0] = True
            rows, slots = rows[kept], slots[kept]
        rivals = self.score.shape[2]

        def pick(value: Tensor) -> Tensor:
            return value[rows, slots].flatten(0, 1)

        def spread(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {k: v[rows].repeat_interleave(rivals, 0) for k, v in values.items()}

        group = torch.arange(len(rows)).repeat_interleave(rivals)
        own = torch.arange(len(group))
        return Batch(
            x=Transition(*map(pick, self.x)) if isinstance(self.x, Transition) else pick(self.x),
            cond=spread(self.cond),
            group=group,
            score=pick(self.score),
            negative=spread(self.negative),
            extra={name: pick(value) for name, value in self.extra.items()},
            kernel=self.kernel,
            guidance=self.guidance,
            grid=self.grid,
            state=torch.where(self.shared[rows, slots].repeat_interleave(rivals), group * rivals, own),
        )


def best_and_worst(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return the best and the worst of K candidates.

    SPO's verdict: the pair counts if the difference of the probabilities that Bradley-Terry gives it is above
    ``threshold``, that is if tanh((best - worst) / 2) is.

    Args:
        scores: (..., K).
        threshold: 0 or more and less than 1.

    Returns:
        (..., 2) indices of best and worst, and their scores (..., 2): 1 and 0, or a tie.
    """
    pair = torch.stack([scores.argmax(-1), scores.argmin(-1)], -1)
    best, worst = scores.gather(-1, pair).unbind(-1)
    won = (torch.tanh((best - worst) / 2) > threshold).to(scores)
    return pair, torch.stack([won, torch.zeros_like(won)], -1)


def in_parts(
    x: Tensor | Transition, score: Tensor, shared: Tensor, extra: Mapping[str, Tensor], size: int
) -> tuple[Tensor | Transition, Tensor, Tensor, dict[str, Tensor]]:
    """Return a round's tensors (N, S, K, ...) and ``shared`` (N, S) as S K / size slots of ``size`` samples
    each.
    """
    parts = score.shape[2] // size

    def split(value: Tensor) -> Tensor:
        return value.unflatten(2, (parts, size)).flatten(1, 2)

    return (
        Transition(*map(split, x)) if isinstance(x, Transition) else split(x),
        split(score),
        shared.repeat_interleave(parts, 1),
        {name: split(value) for name, value in extra.items()},
    )


def only(value: Tensor, pair: Tensor) -> Tensor:
    """(N, S, 2, ...) of ``value`` (N, S, K, ...) at ``pair`` (N, S, 2)."""
    index = pair.reshape(*pair.shape, *(1,) * (value.ndim - 3)).expand(*pair.shape, *value.shape[3:])
    return value.gather(2, index)
