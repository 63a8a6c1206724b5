"""Margin clamp: stop the gradient of a loser whose error is far enough above the reference's.

A pairwise loss falls without bound as the losers' errors rise, and the winners' errors rise with them. With m
the policy's and r the reference's mean squared error of a loser at its noisy state,

    no gradient through the loser where m > (1 + excess) r,

and the value of the loss is unchanged. The bound is relative to r, so that one ``excess`` has the same
meaning at all times and for all models. It is ``losses.clipping.Stop`` for every method. The form is ours:
SimpleTuner's script for music clamps the margin for the same reason, without a published formula; a clamp of
the margin would also stop the gradient of the winner.

In groups of more than two, losers are the members below the group's mean score; ties are on neither side.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.noising import expand
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.strategies._common import (
    Call,
    Recording,
    Wrapped,
    check_rows,
    mean_where,
    overall,
    readable,
    reference_prediction,
    residual,
    sides,
)
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Cond, Denoiser, Method, Random, Reduce, Step


@dataclass(frozen=True, eq=False)
class Stopping(Wrapper):
    """A denoiser without a gradient through losers whose error is too far above the reference's.

    Attributes:
        reference: the reference network, with its recorded calls.
        batch: the samples, of which groups and scores are read.
        reduce: reduction from squared errors (B, *d) to units, as the method has it.
        excess: as in ``MarginClamp``.
        stopped: for each call a mask (B,) of the rows without gradient; appended to by every call.
    """

    reference: Recording
    batch: Batch[Tensor]
    reduce: Reduce
    excess: float
    stopped: list[Tensor]

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the denoiser's prediction."""
        prediction = self.denoiser(x_t, t, cond)
        if not torch.is_grad_enabled():
            return prediction
        check_rows(self.batch, x_t, "margin_clamp")
        value = prediction.detach()
        target = reference_prediction(self.reference, Call(x_t, t, cond, value, True))
        # m and r: mean squared errors of the policy and of the reference, (B,)
        m, r = (
            overall(self.reduce(residual(self.denoiser, self.batch.x, x_t, t, p) ** 2))
            for p in (value, target)
        )
        stopped = sides(self.batch).worse.to(m.device) & (m > (1 + self.excess) * r)
        self.stopped.append(stopped)
        return torch.where(expand(stopped, value), value, prediction)


@dataclass(frozen=True)
class MarginClamp:
    """Stop the gradient of losers whose error has risen far enough.

    Attributes:
        excess: largest relative rise of a loser's error over the reference's, at least 0: 0.1 is 10 percent.
    """

    excess: float = 0.1

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.excess >= 0:
            raise UserError(f"margin_clamp.excess={self.excess}; allowed: 0 or more")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with a bound on its losers' errors.

        Raises:
            UserError: the method's targets cannot be computed from its noisy states.
        """
        return Wrapped(readable(method, "margin_clamp"), self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss, unchanged in value.

        Metric ``margin_clamp/stopped`` is the share of the losers without gradient.

        Raises:
            UserError: the method calls the policy on other samples than the batch's.
        """
        reference_calls, stopped = Recording(reference), list[Tensor]()
        bounded = Stopping(policy, reference_calls, batch, method.reduce, self.excess, stopped)
        step = method(bounded, reference_calls, batch, generator)
        if not stopped:
            return step
        share = torch.stack(stopped).to(torch.float32).mean(0)
        share = mean_where(share, sides(batch).worse.to(share.device))
        return replace(step, metrics={**step.metrics, "margin_clamp/stopped": share})


CARD = StrategyCard(
    name="margin_clamp",
    title="Margin clamp",
    paper="ours, after SimpleTuner's script for music (released code)",
    year=2026,
    arxiv="",
    composes="pairs and lists",
    cost="nothing; 1 reference call where the method does not call the reference before the policy",
    strategy=MarginClamp,
)
