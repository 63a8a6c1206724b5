"""Diffusion-DRO. Wu et al. 2025, "Ranking-based Preference Optimization for Diffusion Models from Implicit
User Feedback", arXiv 2510.18353.

The data are expert demonstrations only. An expert image must be more likely, relative to the reference, than
the policy's own rollout. With m the policy's and r the reference's mean squared denoising error at one time
t, on the expert's x_t (E) and on the rollout's x_t (P), whose target is the prediction of the policy that
made the rollout,

    loss = mean( max( (m_E - r_E) - (m_P - r_P) + margin, 0 ) ).

There is no beta; the reference determines when an expert has a low enough error. Up to the factor ``margin``
it is Diffusion-DPO with a hinge loss and ``beta: 2 / margin``.

The rollout has ``steps`` steps of DPM-Solver++(2M) without guidance, with times shifted per sample so that t
is one of them. As released, the rollout is the current policy's (synchronised after every update), so m_P is
0 without gradient and is not computed. The method is then fine-tuning on experts, with a sample included if
m_E - r_E + |policy - reference|^2 (on the rollout) + margin > 0.

With ``trail.every: M`` above 1 the rollout is that of a copy of the policy which is synchronised every M
optimizer steps (the paper's schedule). m_P is then the squared difference between policy and copy, is
computed with gradient, and the loss increases it.

Experts are single liked images, or the winners of larger groups (none if the best score is shared).

Differences from the released code: each sample is rolled out on its own times (there on those of sample 0);
the rollout stops at the step that is used (there all 20 steps are run); errors are float32.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True, kw_only=True)
class DRO(StateMethod):
    """Ranking loss of expert demonstrations against the policy's own rollouts.

    Attributes:
        margin: margin of the ranking, in mean squared error.
        steps: number of steps of a complete rollout, at least 1.
        time: distribution of the training times, one draw per group, below 1.
        noising: map from experts to noisy states.
        trail: schedule of the policy that is rolled out; with ``every`` 1 it is the trained policy.
    """

    margin: float = 0.001
    steps: int = 20
    trail: Trail = choice(TRAILS, Trail(limit=0.0))

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"method.steps={self.steps}; allowed: 1 or more")

    @property
    def trails(self) -> bool:
        """Whether a moving average or copy of the policy is rolled out."""
        return self.trail.every > 1 or self.trail.limit > 0

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean gated loss over one expert per group."""
        best, good = winners(batch.score, batch.group)
        winning = batch.select(best)
        expert = noisy(self, policy, reference, winning, generator)
        noise = sent(normal(generator, len(winning.x), tuple(winning.x.shape[1:])), winning.x)
        roller = trailing_of(reference, CARD) if self.trails else policy
        rolled = rollout(roller, noise, expert.t, winning.cond, self.steps)
        both = Noised(*(torch.cat([a, b]) for a, b in zip(expert, rolled, strict=True)))
        twice = {name: torch.cat([value, value]) for name, value in winning.cond.items()}
        with torch.no_grad():
            r_expert, r_rollout = denoising_error(reference, both, twice, self.reduce).chunk(2)
        if self.trails:
            m_expert, m_rollout = denoising_error(policy, both, twice, self.reduce).chunk(2)
        else:
            m_expert = denoising_error(policy, expert, winning.cond, self.reduce)
            m_rollout = torch.zeros_like(r_expert)
        # max((m_E - r_E) - (m_P - r_P) + margin, 0)
        difference = m_expert - r_expert
        losses = torch.relu(difference - (m_rollout - r_rollout) + self.margin)
        weight = good.to(difference)

        def mean(values: Tensor) -> Tensor:
            return (values.detach() * weight).sum() / weight.sum().clamp(min=1)

        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        metrics = {"loss": mean(losses), "gate": mean((losses > 0).to(losses)), "drift": mean(r_rollout)}
        metrics |= {"moved": mean(m_rollout)} if self.trails else {}
        return Step(loss, {**metrics, "errors/chosen": mean(difference)}, weight.sum())


def rollout(policy: Denoiser, noise: Tensor, t: Tensor, cond: Cond, steps: int) -> Noised:
    """Return the state at t (B,) of a rollout from ``noise`` (B, *d) with ``steps`` equal steps through t."""
    # `above`: number of grid points t + k / steps, k >= 1, below 1; 1e-3 steps allow for rounding.
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
