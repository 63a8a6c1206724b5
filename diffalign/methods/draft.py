"""DRaFT. Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv
2309.17400.

The reward r of the policy's samples is maximised by its gradient, backpropagated through the last K steps of
the sampler (section 3):

    loss = -r( x_0(theta) ),    with the latents before step T - K held constant.

``last: null`` is DRaFT (all steps), a number DRaFT-K. With ``copies: n`` it is DRaFT-LV: K is 1, the sample
is noised n times to the last step's time and denoised by one step each, and the loss is the mean over the
n + 1 results, so that one rollout gives n + 1 gradients.

The loss and the samples do not depend on K; the gradient does. With K = T it is that of the whole sampler.

No official code. Differences from the ports: the loss has a penalty on the distance to the reference
(``hold``), on by default, since nothing else limits over-optimisation of the reward; DRaFT-LV includes the
original sample in its mean, as the ports to flow models do. Gradient checkpointing of the network and of the
decoder (``model.gradient_checkpointing``) makes large K fit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError
from diffalign.methods._reward_gradients import RewardGradient, Unrolled, gradient_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class DRaFT(RewardGradient):
    """Backpropagate a reward through the last steps of the sampler.

    Attributes:
        last: number K of steps with gradient, at least 1; null: all.
        copies: number n of noised copies (DRaFT-LV), at least 0; above 0 it needs ``last`` 1.
    """

    last: int | None = 1
    copies: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last is not None and self.last < 1:
            raise UserError(f"method.last={self.last}; allowed: 1 or more, or null for all steps")
        if self.copies < 0 or (self.copies and self.last != 1):
            raise UserError(
                f"method.copies={self.copies} with method.last={self.last}; allowed: 0, or more with last 1"
            )

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the step whose loss is minus the mean reward of B samples from noise ``batch.x`` (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        first = 0 if self.last is None else max(0, sampling.steps - self.last)
        carries = torch.arange(sampling.steps)[:, None] >= first
        x0 = sampling.run(carries.expand(-1, len(batch.x)))
        assert batch.value is not None
        rows = torch.arange(len(x0), device=x0.device)
        rewards = [batch.value(x0, rows)]
        t = sent(sampling.times[-2], x0).expand(len(x0))
        for _ in range(self.copies):
            eps = sent(normal(generator, batch.num_groups, x0.shape[1:])[batch.group], x0)
            noised = add_noise(policy, x0.detach(), eps, t)
            rewards.append(batch.value(sampling.step(noised, sampling.steps - 1)[0], rows))
        reward = torch.stack(rewards).mean(0)
        return gradient_step(reward, -reward, sampling.penalty, self.hold)


CARD = MethodCard(
    name="draft",
    title="DRaFT",
    paper="Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards",
    year=2023,
    arxiv="2309.17400",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: K policy steps with gradient, K reference samples, the other steps without",
    method=DRaFT,
    rollout="gradients",
)
