"""Anchor: both members of a pair are tied to the reference's predictions.

SimpleTuner's ``anchor_alpha`` (released code):

    loss = method + (alpha / 2) [ |p_w - ref_w|^2 + |p_l - ref_l|^2 ],

errors here as means over latent elements (SimpleTuner sums by default: its alpha is ours divided by their
number). For a group of K it is alpha times the mean over its members. Predictions of policy and reference are
those of the method's own forwards; a method without a reference costs one reference forward more.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.errors import UserError
from diffalign.strategies._common import Listening, Wrapped, answer, mean_where, overall, told, with_term
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step


@dataclass(frozen=True)
class Anchor:
    """Add the distance to the reference's predictions.

    Attributes:
        alpha: of the term.
    """

    alpha: float = 1.0

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"anchor.alpha={self.alpha}; allowed: more than 0")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with the term added."""
        return Wrapped(method, self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the sum of both losses; ``anchor`` is the term alone."""
        heard, held = Listening(policy), Listening(reference)
        step = method(heard, held, batch, generator)
        distances = []
        for call in heard.of(batch):
            there = answer(held, call)
            moved = at_least_float32(call.prediction) - at_least_float32(there)
            distances.append(overall(method.reduce(moved**2)))
        if not distances:
            raise UserError("strategy anchor: the method never asks the policy about the batch's own samples")
        return with_term(step, "anchor", mean_where(torch.stack(distances).mean(0), told(batch)), self.alpha)


CARD = StrategyCard(
    name="anchor",
    title="Anchor to the reference",
    paper="SimpleTuner, anchor_alpha (released code)",
    year=2025,
    arxiv="",
    composes="all",
    cost="nothing; 1 reference call where the method makes none",
    strategy=Anchor,
)
