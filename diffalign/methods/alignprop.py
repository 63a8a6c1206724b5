"""AlignProp. Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
arXiv 2310.03739.

DRaFT with a random truncation. The reward is backpropagated through the sampler from a random step b on
(section 4, "randomized truncated backpropagation through time"),

    loss = -r( x_0(theta) ),    b = round(T N(centre, spread)), redrawn until 1 <= b < T.

As released, centre .84 and spread .1 (42 and 5 of 50 steps): the mean depth is 8 steps of 50.

Differences from the released code (mihirp1998/AlignProp): b is drawn per group (there per process); steps
before b run without gradient (there with gradient and detached predictions); the reward itself is maximised
(there |r - 10| of the aesthetic score or 1 - HPS, times .01, is minimised); DDIM has eta 0 (there 1); the
loss has a penalty on the distance to the reference (``hold``).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError
from diffalign.methods._reward_gradients import RewardGradient, Unrolled, gradient_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step

TRIES = 16
"""Number of draws of b, of which the first in range is used; if none is, the centre is."""


@dataclass(frozen=True)
class AlignProp(RewardGradient):
    """Backpropagate a reward through a random number of last steps.

    Attributes:
        centre: mean of the first step with gradient, as a share of all steps, in (0, 1).
        spread: standard deviation of that step, as a share of all steps, at least 0.
    """

    centre: float = 0.84
    spread: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.centre < 1:
            raise UserError(f"method.centre={self.centre}; allowed: more than 0 and less than 1")
        if self.spread < 0:
            raise UserError(f"method.spread={self.spread}; allowed: 0 or more")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the step whose loss is minus the mean reward of B samples from noise ``batch.x`` (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        first = self.first_steps(batch.num_groups, sampling.steps, generator)[batch.group]
        carries = torch.arange(sampling.steps)[:, None] >= first
        x0 = sampling.run(carries)
        assert batch.value is not None
        reward = batch.value(x0, torch.arange(len(x0), device=x0.device))
        return gradient_step(reward, -reward, sampling.penalty, self.hold)

    def first_steps(self, groups: int, steps: int, generator: Random | torch.Generator) -> Tensor:
        """Return the first step with gradient of each group, (groups,) int64 from 1 to ``steps`` - 1."""
        draws = self.centre * steps + self.spread * steps * normal(generator, groups, (TRIES,)).cpu()
        candidates = draws.round().long()
        valid = (candidates >= 1) & (candidates < steps)
        chosen = candidates.gather(1, valid.int().argmax(1, keepdim=True))[:, 0]
        middle = min(max(1, round(self.centre * steps)), max(1, steps - 1))
        return torch.where(valid.any(1), chosen, torch.full_like(chosen, middle))


CARD = MethodCard(
    name="alignprop",
    title="AlignProp",
    paper="Prabhudesai et al., Aligning Text-to-Image Diffusion Models with Reward Backpropagation",
    year=2023,
    arxiv="2310.03739",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: about a sixth of the sampling's policy steps with gradient, as many reference samples",
    method=AlignProp,
    rollout="gradients",
)
