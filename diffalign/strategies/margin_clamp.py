"""Margin clamp: a loser that has been pushed far enough is pushed no further.

A pairwise loss gains without end by raising the losers' errors, and with them all errors rise. With m the
policy's and r the reference's mean squared error of a loser at its noisy state,

    no gradient through the loser where m > (1 + excess) r,

and the value of the loss stays what it is. The bound is relative to r, so that one number means the same at
all times and for all models. It is the ``stop`` of TDPO's clips for every method. The form is ours:
SimpleTuner's script for music has a clamp of the margin after "unlearning" without bound had spoiled its
sampler, of which no formula is known to us; a clamp of the whole margin would stop the winner too.

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
    Listening,
    Wrapped,
    answer,
    check_rows,
    mean_where,
    overall,
    readable,
    residual,
    sides,
)
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Cond, Denoiser, Method, Random, Reduce, Step


@dataclass(frozen=True, eq=False)
class Stopping(Wrapper):
    """A denoiser without a gradient through losers whose error is too far above the reference's.

    Attributes:
        held: the reference.
        batch: who lost.
        reduce: the unit of the method.
        excess: see ``MarginClamp``.
        stopped: (B,) of each call, which rows have no gradient.
    """

    held: Listening
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
        still = prediction.detach()
        there = answer(self.held, Call(x_t, t, cond, still, True))
        m, r = (
            overall(self.reduce(residual(self.denoiser, self.batch.x, x_t, t, p) ** 2))
            for p in (still, there)
        )
        stopped = sides(self.batch).worse.to(m.device) & (m > (1 + self.excess) * r)
        self.stopped.append(stopped)
        return torch.where(expand(stopped, still), still, prediction)


@dataclass(frozen=True)
class MarginClamp:
    """Stop losers whose error has risen enough.

    Attributes:
        excess: share of the reference's error by which a loser's may be higher.
    """

    excess: float = 0.1

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.excess >= 0:
            raise UserError(f"margin_clamp.excess={self.excess}; allowed: 0 or more")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with its losers stopped.

        Raises:
            UserError: its targets cannot be read off its noisy states.
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
        """Return the method's loss, unchanged in value; ``margin_clamp/stopped`` is the share of its losers
        that have no gradient.
        """
        held, stopped = Listening(reference), list[Tensor]()
        step = method(
            Stopping(policy, held, batch, method.reduce, self.excess, stopped), held, batch, generator
        )
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
    cost="nothing; 1 reference call where the method makes none before its policy's",
    strategy=MarginClamp,
)
