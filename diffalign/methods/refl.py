"""ReFL. Xu et al. 2023, "ImageReward: Learning and Evaluating Human Preferences for Text-to-Image
Generation", arXiv 2304.05977, algorithm 1.

The policy samples without gradient to a late step j, drawn uniformly, and predicts the clean latents there in
one call with gradient. The loss of that prediction is

    loss = scale relu(margin - r( x0_hat(x_j, t_j) )),    j ~ U{ceil(low T), ..., T - 1}.

Rewards of ``margin`` and more have no gradient (metric ``past_margin``, their share). As released: scale
.001, margin 2 (ImageReward has mean 0 and standard deviation 1), T = 40 steps and low .75.

Differences from the released code (THUDM/ImageReward, ReFL.py): each group has its own step and noise (there
a seeded run has the same on every process); guidance may be used; the loss has a penalty on the distance to
the reference (``hold``) in place of the paper's pre-training loss, which the code lacks.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class ReFL(RewardGradient):
    """Maximise the reward of one late prediction.

    Attributes:
        low: first rewarded step as a share of all steps, in [0, 1).
        margin: reward from which the gradient is 0.
        scale: factor of the loss, above 0.
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

    @property
    def saturation(self) -> float:
        """The margin."""
        return self.margin

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss of B samples from noise ``batch.x`` (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        first = min(math.ceil(self.low * sampling.steps), sampling.steps - 1)
        draws = uniform(generator, batch.num_groups)[batch.group]
        step = sent(first + (draws * (sampling.steps - first)).long(), batch.x.device)
        sampling.run(torch.zeros(sampling.steps, len(batch.x), dtype=torch.bool))
        states = torch.stack(sampling.states)  # (T, B, *d)
        x_t = states.gather(0, expand(step, batch.x).expand_as(batch.x)[None])[0]
        t = sent(sampling.times, x_t)[step]
        assert batch.value is not None
        rows = torch.arange(len(x_t), device=x_t.device)
        clean, _, distance = sampling.predicted(x_t, t)
        reward = batch.value(clean, rows)
        loss = self.scale * (self.margin - reward).relu()
        # `hold` is in units of the reward, the loss in units of the scaled reward
        return gradient_step(reward, loss, distance, self.hold * self.scale, reward >= self.margin)


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
