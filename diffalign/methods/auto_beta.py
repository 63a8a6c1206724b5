"""Diffusion-DPO with a beta that finds itself: SimpleTuner's ``auto_beta`` (bghira/SimpleTuner, the Flow-DPO
distiller; no paper).

    loss = -log sigmoid(beta d),    d = -1/2 [(m_w - r_w) - (m_l - r_l)],
    beta = log((1 - target) / target) / EMA(mean |d|),   kept within [low, high].

The gradient of a pair is beta sigmoid(-beta d): a pair of average margin that is the right way round keeps a
share ``target`` of its pull, however large errors are in the model at hand. SimpleTuner writes it with twice
d and half of beta. Its sums over latent elements and clamps [.001, 1] are, at 512 px in 16 channels (65,536
elements), the means and clamps here.

Beta falls as margins grow, so the pull never ends by itself: ``low`` is what holds the policy near the
reference, and a run without a floor leaves the support. The average is a mean over all processes, moves once
per micro-batch while gradients are taken (measuring leaves it alone), and is a part of a checkpoint. What
differs: a mean of exactly 0 (nothing has moved yet, or only ties) is not averaged in; SimpleTuner starts from
it and then holds beta at its highest for long.
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
    """The running mean of |d|, a float64 scalar; 0 until there is one."""

    def __init__(self) -> None:
        self.value = torch.zeros((), dtype=torch.float64)

    def update(self, mean: Tensor, decay: float) -> None:
        """Take in one mean, without waiting for the device; 0 says nothing."""
        mean, old = mean.double(), self.value.to(mean.device)
        new = torch.where(old > 0, decay * old + (1 - decay) * mean, mean)
        self.value = torch.where(mean > 0, new, old)


@dataclass(frozen=True, kw_only=True)
class AutoBeta(StateMethod):
    """Pairs of rivals, beta from the size of their margins.

    Attributes:
        target: share of its gradient that a pair of average margin keeps, below 1/2.
        decay: of the running mean.
        low: least beta, in units of a mean squared error with Diffusion-DPO's 1/2.
        high: largest beta; also the first, while nothing has moved.
        loss: what a pair demands of its logit.
        running: the state; copies made by ``dataclasses.replace`` share it.
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
        """Return the mean loss over all pairs of rivals that are no tie. A collective while gradients are
        taken.
        """
        c = compare(self, policy, reference, batch, generator)
        if torch.is_grad_enabled():
            self.running.update(mean_over_ranks(c.margin.detach().abs(), c.weight), self.decay)
        slope = math.log((1 - self.target) / self.target)
        beta = (slope / self.running.value).clamp(self.low, self.high).to(c.margin)
        losses = pair_losses(self.loss, beta * c.chosen, beta * c.rejected, c, batch)
        step = preference_step(c, losses, beta)
        return Step(step.loss, {**step.metrics, "beta": beta}, step.weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean."""
        return {"margin": self.running.value.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``'s answer."""
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
