"""Importance weights: multiply the gradient of each group by a weight that is computed from a data column.

    gradient = sum_g w_g gradient_g / sum_g 1,    w_g = formula(batch.extra[source] of the group).

``semantic`` is Sem-DPO's exp(-alpha distance) (arXiv 2507.20133), with distance = 1 - cosine similarity of
the prompt and the preferred sample; ``rare`` is the (scale / score)^power of VideoDPO's released code (arXiv
2412.14167: scale 0.72), which raises the weight of groups with a small score; ``given`` uses the column
itself.

A group's weight multiplies the gradient of its rows. For a loss that is a sum over groups this is exactly the
gradient of the mean of w_g loss_g; terms that combine groups (KTO's estimate of the KL, sorted margins) are
not weighted. The logged loss is unweighted. Weights are not normalised; their mean is logged. Sem-DPO's alpha
is not known to us; the default 1 is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.strategies._common import Scaled, Wrapped, best, by_group, check_rows, informative, mean_where
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step
from diffalign.utils.transfer import sent


@runtime_checkable
class Formula(Protocol):
    """Map the value of a group to its weight."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return the weights (G,) of values (G,)."""
        ...


@dataclass(frozen=True)
class Given:
    """Use the value as the weight."""

    def __call__(self, values: Tensor) -> Tensor:
        """Return (G,) weights."""
        return values


@dataclass(frozen=True)
class Semantic:
    """Weight exp(-alpha distance), as in Sem-DPO.

    Attributes:
        alpha: rate of decay, above 0.
        of: meaning of the value: a distance, or a similarity s whose distance is 1 - s.
    """

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
    """Weight (scale / value)^power, as in VideoDPO's released code; values must be above 0.

    Attributes:
        scale: value whose weight is 1, above 0.
        power: exponent.
    """

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
    """Weight the gradients of groups.

    Attributes:
        source: name of the column, a key of ``Batch.extra``.
        column: index of the number, where the column has several per sample; counted from 0.
        member: "best": a group's value is that of its best sample; "mean": the mean over its members.
        formula: function from a group's value to its weight.
    """

    source: str = "weight"
    column: int = 0
    member: Literal["best", "mean"] = "best"
    formula: Formula = choice(FORMULAS, Given())

    needs_reference: ClassVar[bool] = False

    @property
    def extras(self) -> frozenset[str]:
        """``source``."""
        return frozenset({self.source})

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
        """Return the method's loss, unchanged in value; metric ``weighted/mean`` is the mean weight."""
        weight = self.weights(batch)
        rows = weight[sent(batch.group, weight.device)]

        def factors(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            check_rows(batch, x_t, "weighted")
            return rows.to(prediction.device)

        step = method(Scaled(policy, factors), reference, batch, generator)
        return replace(step, metrics={**step.metrics, "weighted/mean": mean_where(rows, informative(batch))})

    def weights(self, batch: Batch[Any]) -> Tensor:
        """Return (G,) float32 weights of a batch's groups.

        Raises:
            UserError: ``Batch.extra`` has no such column, or it has fewer numbers per sample.
        """
        if self.source not in batch.extra:
            names = ", ".join(batch.extra) or "none"
            raise UserError(f"weighted.source={self.source!r}: the data has no such column; it has: {names}")
        values = batch.extra[self.source].float().reshape(len(batch.group), -1)
        if not 0 <= self.column < values.shape[1]:
            raise UserError(
                f"weighted.column={self.column}: {self.source!r} has {values.shape[1]} column(s), from 0 on"
            )
        value = values[:, self.column]
        chosen = by_group(value, batch.group, "mean") if self.member == "mean" else value[best(batch)[0]]
        return self.formula(chosen)


CARD = StrategyCard(
    name="weighted",
    title="Importance weights",
    paper="Sem-DPO (exp(-alpha distance)); Liu et al., VideoDPO (released code's rarity weight)",
    year=2025,
    arxiv="2507.20133",
    composes="all; needs a column of the data",
    cost="nothing",
    strategy=Weighted,
)
