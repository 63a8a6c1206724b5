"""Diffusion-DRO. Wu et al. 2025, "Ranking-based Preference Optimization for Diffusion Models from Implicit
User Feedback", arXiv 2510.18353.

Learns from expert demonstrations alone: an expert image must be likelier, against the reference, than what
the policy itself does in a rollout. With m the policy's and r the reference's mean squared denoising error,
at one time t shared by both, on the expert x_t (E) and on the rollout's x_t (P), whose target is what the
policy predicts there,

    loss = mean( max( (m_E - r_E) - (m_P - r_P) + margin, 0 ) ).

There is no beta: the reference only says when an expert has been learnt well enough. Up to the factor
``margin`` it is Diffusion-DPO with a hinge and ``beta: 2 / margin``.

The rollout has ``steps`` steps of DPM-Solver++(2M) without guidance, perturbed in time so that a sample
passes t. As released, the rollout is the current policy's (synchronised after every update), so m_P is 0 and
has no gradient: that half of the batch is not run, which changes nothing but the time. It is fine-tuning on
experts, each gated by m_E - r_E + |policy - reference|^2 on the rollout + margin > 0.

With ``trail.every: M`` above 1 the rollout is that of a copy of the policy which is synchronised every M
optimizer steps (the paper's schedule). Then m_P is the way that the policy has gone since, that half is run
with gradient, and the loss pushes the policy away from what the copy does.

Experts are single images that are liked, or the winners of larger groups (none where the best score is
shared).

What differs from the released code: each sample is rolled out on its own times (there, sample 0's serve
all); it stops at the step that is used, where 20 of 20 steps were run for one; errors are float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import denoising_error
from diffalign.diffusion.randomness import normal
from diffalign.diffusion.solvers import dpm_solver
from diffalign.errors import UserError
from diffalign.methods._base import StateMethod
from diffalign.methods._common import noisy
from diffalign.methods._trailing import TRAILS, Trail, trailing_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.methods.sft import winners
from diffalign.types import Batch, Cond, Denoiser, Noised, Random, Step


@dataclass(frozen=True, kw_only=True)
class DRO(StateMethod):
    """Expert demonstrations against the policy's own rollouts.

    Attributes:
        margin: how much further than the rollout an expert must have come, in mean squared error.
        steps: of a whole rollout.
        time: which times are trained on, one per group, below 1.
        noising: how experts become noisy states.
        trail: how the policy that is rolled out follows; ``every`` 1: it is the policy itself.
    """

    margin: float = 0.001
    steps: int = 20
    trail: Trail = choice(TRAILS, Trail(limit=0.0))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"method.steps={self.steps}; allowed: 1 or more")

    @property
    def trails(self) -> bool:
        """Whether another policy than the trained one is rolled out."""
        return self.trail.every > 1 or self.trail.limit > 0

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean gated loss over one expert per group."""
        best, good = winners(batch.score, batch.group)
        won = batch.select(best)
        expert = noisy(self, policy, reference, won, generator)
        noise = normal(generator, len(won.x), tuple(won.x.shape[1:])).to(won.x)
        roller = trailing_of(reference, CARD) if self.trails else policy
        rolled = rollout(roller, noise, expert.t, won.cond, self.steps)
        both = Noised(*(torch.cat([a, b]) for a, b in zip(expert, rolled, strict=True)))
        twice = {name: torch.cat([value, value]) for name, value in won.cond.items()}
        with torch.no_grad():
            held, drift = denoising_error(reference, both, twice, self.reduce).chunk(2)
        if self.trails:
            ahead, moved = denoising_error(policy, both, twice, self.reduce).chunk(2)
        else:
            ahead, moved = denoising_error(policy, expert, won.cond, self.reduce), torch.zeros_like(held)
        ahead = ahead - held
        losses, weight = torch.relu(ahead - (moved - drift) + self.margin), good.to(ahead)

        def mean(values: Tensor) -> Tensor:
            return (values.detach() * weight).sum() / weight.sum().clamp(min=1)

        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        metrics = {"loss": mean(losses), "gate": mean((losses > 0).to(losses)), "drift": mean(drift)}
        metrics |= {"moved": mean(moved)} if self.trails else {}
        return Step(loss, {**metrics, "errors/chosen": mean(ahead)}, weight.sum())


def rollout(policy: Denoiser, noise: Tensor, t: Tensor, cond: Cond, steps: int) -> Noised:
    """Where a rollout of ``steps`` equal steps from ``noise`` (B, *d) that passes t (B,) is at t."""
    # Rows above t: the grid is t + k / steps below 1. A thousandth of a step is rounding.
    above = (((1 - t) * steps - 1e-3).ceil() - 1).clamp(min=0)
    rows = torch.arange(int(above.max()) + 1, device=t.device)[:, None]
    return dpm_solver(policy, noise, t + (above - rows) / steps, above.long().cpu(), cond)


CARD = MethodCard(
    name="dro",
    title="Diffusion-DRO",
    paper="Wu et al., Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback",
    year=2025,
    arxiv="2510.18353",
    data=DataKind.DEMONSTRATIONS,
    cost="1 policy sample with gradient (2 where the rollout trails), about 10.5 without (the rollout), "
    "2 reference samples",
    method=DRO,
    trailing="beside",
)
