"""ReFL. Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation", arXiv 2304.05977, algorithm 1.

The policy samples without gradient to a late step j, drawn uniformly, predicts the clean latents there in one
call with gradient, and that prediction is rewarded:

    loss = scale relu(margin - r( x0_hat(x_j, t_j) )),    j ~ U{ceil(low T), ..., T - 1}.

Rewards of ``margin`` and more have no gradient. As released: scale .001, margin 2 (ImageReward has mean 0 and
standard deviation 1), T = 40 steps and low .75.

What differs from the released code (THUDM/ImageReward, ReFL.py): each group has its own step and noise,
where a seeded run has the same on every process; guidance may be used; there is a penalty on the distance
to the reference (``hold``), where the paper mixes in a pre-training loss that the code lacks.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.noising import expand
from diffalign.diffusion.randomness import uniform
from diffalign.errors import UserError
from diffalign.methods._reward_gradients import RewardGradient, Unrolled, gradient_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True)
class ReFL(RewardGradient):
    """Reward of one late prediction.

    Attributes:
        low: share of the steps before which no prediction is rewarded.
        margin: reward above which nothing is learnt.
        scale: of the loss.
    """

    low: float = 0.75
    margin: float = 2.0
    scale: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.low < 1:
            raise UserError(f"method.low={self.low}; allowed: 0 or more and less than 1")
        if not self.scale > 0:
            raise UserError(f"method.scale={self.scale}; allowed: more than 0")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss of B samples, of ``batch.x`` noise (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        first = min(math.ceil(self.low * sampling.steps), sampling.steps - 1)
        draws = uniform(generator, batch.num_groups)[batch.group]
        step = (first + (draws * (sampling.steps - first)).long()).to(batch.x.device)
        sampling.run(torch.zeros(sampling.steps, len(batch.x), dtype=torch.bool, device=batch.x.device))
        states = torch.stack(sampling.states)  # (T, B, *d)
        x_t = states.gather(0, expand(step, batch.x).expand_as(batch.x)[None])[0]
        t = sampling.times.to(x_t)[step]
        assert batch.value is not None
        rows = torch.arange(len(x_t), device=x_t.device)
        clean, _, distance = sampling.predicted(x_t, t)
        reward = batch.value(clean, rows)
        loss = self.scale * (self.margin - reward).relu()
        # the penalty is in units of the reward, as the loss is of the scaled one
        return gradient_step(reward, loss, distance, self.hold * self.scale)


CARD = MethodCard(
    name="refl",
    title="ReFL",
    paper="Xu et al., ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation",
    year=2023,
    arxiv="2304.05977",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: 1 policy prediction with gradient, 1 reference sample, the sampling without",
    method=ReFL,
    rollout="gradients",
)
