"""Diffusion-DPO with an adaptive beta: SimpleTuner's ``auto_beta`` (the Flow-DPO distiller of
bghira/SimpleTuner; no paper).

    loss = -log sigmoid(beta d),    d = -1/2 [(m_w - r_w) - (m_l - r_l)],
    beta = log((1 - target) / target) / EMA(mean |d|),   kept within [low, high].

The gradient of a pair is beta sigmoid(-beta d), so that a correctly ordered pair with an average margin keeps
a share ``target`` of its gradient, independently of the size of the model's errors. SimpleTuner writes it
with twice d and half of beta. Its sums over latent elements and clamps [.001, 1] correspond, at 512 px with
16 channels (65,536 elements), to the means and clamps here.

Beta falls as margins grow, so the gradient does not vanish by itself: ``low`` bounds the distance to the
reference, and without it a run can diverge. The running mean is taken over all processes, is updated once per
micro-batch with gradients (not in evaluation), and is saved in checkpoints. Difference from SimpleTuner: a
mean of exactly 0 (before the first update of the policy, or with ties only) is skipped; SimpleTuner starts
from it, which keeps beta at its maximum for long.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.methods._base import StateMethod
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.distributed import mean_over_ranks


class Running:
    """Running mean of |d|, a float64 scalar; 0 before the first update."""

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.float64)

    def update(self, mean: Tensor, decay: float) -> None:
        """Update with one mean, without synchronising with the device; a mean of 0 is skipped."""
        mean, old = mean.double(), self.value.to(mean.device)
        new = torch.where(old > 0, decay * old + (1 - decay) * mean, mean)
        self.value = torch.where(mean > 0, new, old)


@dataclass(frozen=True, kw_only=True)
class AutoBeta(StateMethod):
    """Diffusion-DPO with a beta that adapts to the size of the margins.

    Attributes:
        target: share of its gradient that a pair with an average margin keeps, in (0, 1/2).
        decay: decay of the running mean, in [0, 1).
        low: smallest beta, above 0; rewards are beta (r - m) / 2.
        high: largest beta, and the one before the policy has changed.
        loss: pairwise loss of the rewards of two rivals.
        running: running mean of |d|; copies made by ``dataclasses.replace`` share it.
    """

    target: float = 0.2
    decay: float = 0.99
    low: float = 65.536
    high: float = 65536.0
    loss: PairwiseLoss = choice(LOSSES, Logistic())
    running: Running = field(default_factory=Running, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.target < 0.5 or not 0 <= self.decay < 1:
            raise UserError(
                f"method.target={self.target}, decay={self.decay}; allowed: 0 < target < 0.5, 0 <= decay < 1"
            )
        if not 0 < self.low <= self.high:
            raise UserError(f"method.low={self.low}, high={self.high}; allowed: 0 < low <= high")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied.

        With gradients enabled it is a collective operation.
        """
        c = compare(self, policy, reference, batch, generator)
        if torch.is_grad_enabled():
            self.running.update(mean_over_ranks(c.margin.detach().abs(), c.weight), self.decay)
        # beta = log((1 - target) / target) / EMA(mean |d|)
        slope = math.log((1 - self.target) / self.target)
        beta = (slope / self.running.value).clamp(self.low, self.high).to(c.margin)
        losses = pair_losses(self.loss, beta * c.chosen, beta * c.rejected, c, batch)
        step = preference_step(c, losses, beta)
        return Step(step.loss, {**step.metrics, "beta": beta}, step.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"margin": self.running.value.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the result of ``state_dict``."""
        self.running.value = torch.tensor(state["margin"], dtype=torch.float64)


CARD = MethodCard(
    name="auto_beta",
    title="DPO with automatic beta",
    paper="SimpleTuner's Flow-DPO; Liu et al., Improving Video Generation with Human Feedback (its loss)",
    year=2025,
    arxiv="2501.13918",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=AutoBeta,
    soft=True,
)
