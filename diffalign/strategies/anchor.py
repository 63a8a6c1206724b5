"""Anchor: a penalty on the distance of the policy's predictions to the reference's, for both of a pair.

SimpleTuner's ``anchor_alpha`` (released code):

    loss = method + (alpha / 2) [ |p_w - ref_w|^2 + |p_l - ref_l|^2 ],

with errors averaged over latent elements (SimpleTuner sums by default: its alpha is ours divided by their
number). For a group of K the term is alpha times the mean over its members. The predictions are those of the
method's own network calls; for a method without a reference the term costs one reference call.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.errors import UserError
from diffalign.strategies._common import (
    Recording,
    Wrapped,
    informative,
    mean_where,
    overall,
    reference_prediction,
    with_term,
)
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step


@dataclass(frozen=True)
class Anchor:
    """Add the squared distance to the reference's predictions.

    Attributes:
        alpha: weight of the anchor term, above 0.
    """

    alpha: float = 1.0

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise UserError(f"anchor.alpha={self.alpha}; allowed: more than 0")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with the anchor term added."""
        return Wrapped(method, self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss plus the anchor term; metric ``anchor`` is the term.

        Raises:
            UserError: the method never calls the policy on the batch's own samples.
        """
        policy_calls, reference_calls = Recording(policy), Recording(reference)
        step = method(policy_calls, reference_calls, batch, generator)
        distances = []
        for call in policy_calls.of(batch):
            target = reference_prediction(reference_calls, call)
            difference = at_least_float32(call.prediction) - at_least_float32(target)
            distances.append(overall(method.reduce(difference**2)))
        if not distances:
            raise UserError(
                "strategy anchor: the method never calls the policy on the batch's own samples; allowed: "
                "methods that do"
            )
        term = mean_where(torch.stack(distances).mean(0), informative(batch))
        return with_term(step, "anchor", term, self.alpha)


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
