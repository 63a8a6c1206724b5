"""Importance weights: some groups count more than others, by a number that the data brings.

    gradient = sum_g w_g gradient_g / sum_g 1,    w_g = formula(batch.extra[source] of the group).

``semantic`` is Sem-DPO's exp(-alpha distance) (arXiv 2507.20133), the distance being 1 - cosine similarity of
the prompt and what was preferred; ``rare`` is the (scale / score)^power of VideoDPO's released code (arXiv
2412.14167: scale 0.72), which lifts groups with a small score; ``given`` takes the number as it is.

A group's weight multiplies the gradient of its rows, which is exactly the gradient of the mean of w_g loss_g
for every loss that is a sum over groups; where groups meet inside a loss (KTO's estimate of the KL, sorted
margins) that part is left as it is. The logged loss is the unweighted one, and weights are not normalised:
their mean is logged. Sem-DPO's alpha is not known to us; 1 is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.strategies._common import Scaled, Wrapped, best, by_group, check_rows, mean_where, told
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step


@runtime_checkable
class Formula(Protocol):
    """From what the data says of a group to its weight."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return (G,) weights of (G,) values."""
        ...


@dataclass(frozen=True)
class Given:
    """The value is the weight."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return (G,) weights."""
        return values


@dataclass(frozen=True)
class Semantic:
    """exp(-alpha distance); of a ``similarity`` the distance is 1 - similarity."""

    alpha: float = 1.0
    of: Literal["distance", "similarity"] = "distance"

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"weighted.formula.alpha={self.alpha}; allowed: more than 0")

    def __call__(self, values: Tensor) -> Tensor:
        """Return (G,) weights."""
        return torch.exp(-self.alpha * (1 - values if self.of == "similarity" else values))


@dataclass(frozen=True)
class Rare:
    """(scale / value)^power; values must be above 0."""

    scale: float = 0.72
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise UserError(f"weighted.formula.scale={self.scale}; allowed: more than 0")

    def __call__(self, values: Tensor) -> Tensor:
        """Return (G,) weights."""
        return (self.scale / values) ** self.power


FORMULAS: Mapping[str, type[Formula]] = {"given": Given, "semantic": Semantic, "rare": Rare}


@dataclass(frozen=True)
class Weighted:
    """Weigh groups.

    Attributes:
        source: which of the batch's extras.
        column: which number of it, where a sample has several.
        member: a group's value is its best sample's, or the mean over its members.
        formula: from the value to the weight.
    """

    source: str = "weight"
    column: int = 0
    member: Literal["best", "mean"] = "best"
    formula: Formula = choice(FORMULAS, Given())

    needs_reference: ClassVar[bool] = False

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with weighted groups."""
        return Wrapped(method, self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss, unchanged in value; ``weighted/mean`` is the mean weight."""
        weight = self.weights(batch)
        rows = weight[batch.group.to(weight.device)]

        def factors(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            check_rows(batch, x_t, "weighted")
            return rows.to(prediction.device)

        step = method(Scaled(policy, factors), reference, batch, generator)
        return replace(step, metrics={**step.metrics, "weighted/mean": mean_where(rows, told(batch))})

    def weights(self, batch: Batch[Any]) -> Tensor:
        """Return (G,) float32 weights of a batch's groups.

        Raises:
            UserError: the batch has no such extra, or it has fewer columns.
        """
        if self.source not in batch.extra:
            there = ", ".join(batch.extra) or "none"
            raise UserError(f"weighted.source={self.source!r}: the data has no such extra; it has: {there}")
        values = batch.extra[self.source].float().reshape(len(batch.group), -1)
        if not 0 <= self.column < values.shape[1]:
            raise UserError(
                f"weighted.column={self.column}: {self.source!r} has {values.shape[1]} column(s), from 0 on"
            )
        value = values[:, self.column]
        group = batch.group.to(value.device)
        chosen = by_group(value, group, "mean") if self.member == "mean" else value[best(batch)[0]]
        return self.formula(chosen)


CARD = StrategyCard(
    name="weighted",
    title="Importance weights",
    paper="Sem-DPO (exp(-alpha distance)); Liu et al., VideoDPO (released code's rarity weight)",
    year=2025,
    arxiv="2507.20133",
    composes="all; the data brings the numbers",
    cost="nothing",
    strategy=Weighted,
)
