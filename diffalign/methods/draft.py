"""DRaFT. Clark et al. 2023, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards", arXiv
2309.17400.

The reward r of what the policy samples is maximised by its own gradient, backpropagated through the last K
steps of the sampler (section 3):

    loss = -r( x_0(theta) ),    the latents that enter step T - K being constants.

``last: null`` is DRaFT (all steps), a number DRaFT-K. With ``copies: n`` it is DRaFT-LV: K is 1, the result
is noised again n times to the last step's time and denoised once each, and the loss is the mean over the
n + 1 results, so that one rollout gives n + 1 gradients.

Loss and images are the same for every K; gradients differ. With K = T the gradient is that of the whole
sampler.

No official code. What differs from the ports: there is a penalty on the distance to the reference
(``hold``), on by default, since nothing else stops the reward from being exploited; DRaFT-LV counts the
sample that was not noised again among its terms, as the flow ports do. Gradient checkpointing of the
network and of the decoder (``model.gradient_checkpointing``) makes large K fit.
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


@dataclass(frozen=True)
class DRaFT(RewardGradient):
    """Backpropagation of a reward through the last steps of the sampler.

    Attributes:
        last: K, steps that carry gradient; None: all.
        copies: n of DRaFT-LV; more than 0 needs ``last`` 1.
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
        """Return minus the mean reward; B samples, of ``batch.x`` noise (B, *d)."""
        sampling = Unrolled(policy, reference if self.hold else None, batch)
        first = 0 if self.last is None else max(0, sampling.steps - self.last)
        carries = torch.arange(sampling.steps)[:, None] >= first
        x0 = sampling.run(carries.expand(-1, len(batch.x)).to(batch.x.device))
        assert batch.value is not None
        rows = torch.arange(len(x0), device=x0.device)
        rewards = [batch.value(x0, rows)]
        t = sampling.times[-2].to(x0).expand(len(x0))
        for _ in range(self.copies):
            eps = normal(generator, batch.num_groups, x0.shape[1:])[batch.group].to(x0)
            again = add_noise(policy, x0.detach(), eps, t)
            rewards.append(batch.value(sampling.step(again, sampling.steps - 1)[0], rows))
        reward = torch.stack(rewards).mean(0)
        return gradient_step(reward, -reward, sampling.held, self.hold)


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
