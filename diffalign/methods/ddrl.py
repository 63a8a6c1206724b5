"""DDRL, data-regularised reinforcement learning. arXiv 2512.04332 (2025), with the released code (cosmos-rl).

A policy gradient that is held by the data and not by a reference: in place of the KL of the policy to its
base, which the policy's own samples estimate, the KL of the data to the policy, the denoising loss on real
samples, which nothing that the reward likes can lower. With mu and mu_old the means of the policy's step
and of the step x as drawn, D latent elements and the advantage A,

    rho  = exp( mean( (x - mu_old)^2 - (x - mu)^2 ) ),    A = clip(A, -a, a),
    loss = mean max( -A rho, -A clip(rho, 1 - c, 1 + c) ) + data_beta mean |prediction - target|^2 + kl KL.

The ratio is of bare squared errors, without 1 / (2 std^2), as released. ``exp_reward`` takes -exp(-A) for
A, which is the gradient of the paper's objective and always below 0: every sample is pushed down, the worst
most, and the data must carry the mass. KL is that of the policy's steps to the base's, for which a run then
keeps a reference.

The data are ``data.path``, beside ``rollout.prompts``: the winners of its groups, liked images of singles.
They are noised to the times of the recorded steps, each with fresh noise; what differs from the released
code, which takes the rollout's own noise for it, and trains on data at all steps of a trajectory in turn. A
group of samples without any advantage is left out, also under ``exp_reward``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import PerSample, denoising_error, step_kl
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import normal
from diffalign.errors import UserError
from diffalign.losses.policy_gradient import ppo
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import advantage_of, advantage_weight, check_advantages, check_kl, redrawn
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.methods.sft import winners
from diffalign.types import Batch, Denoiser, Noised, Random, Step, Transition


@dataclass(frozen=True)
class DDRL(RolloutMethod):
    """Single steps of whole trajectories with advantages, and real samples beside them.

    Attributes:
        clip: how far from 1 the ratio is rewarded.
        advantage_clip: advantages further from 0 count as this.
        data_beta: weight of the denoising loss on data.
        exp_reward: take -exp(-A) for A.
        kl: weight of the KL of the policy's steps to the base's; 0: there is no reference.
        hold_negative: no gradient through what guidance guides away from.
    """

    clip: float = 1e-4
    advantage_clip: float = 5.0
    data_beta: float = 0.01
    exp_reward: bool = False
    kl: float = 0.0
    hold_negative: bool = True

    def __post_init__(self) -> None:
        check_advantages(self)
        check_kl(self.kl)
        if not self.data_beta > 0:
            raise UserError(f"method.data_beta={self.data_beta}; allowed: more than 0")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl > 0

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all recorded steps and the data beside them.

        Raises:
            UserError: the batch is not of a rollout, or has no data beside it.
        """
        raw = advantage_of(batch, CARD)
        advantage = raw.clamp(-self.advantage_clip, self.advantage_clip)
        if self.exp_reward:
            advantage = -torch.exp(-advantage)
        new = redrawn(policy, batch, CARD, self.hold_negative)
        x = batch.x.x_s.to(new.mean)
        log_ratio = ((x - new.drawn_mean) ** 2 - (x - new.mean) ** 2).flatten(1).mean(1)
        losses, ratio = ppo(log_ratio, advantage.to(log_ratio), self.clip)
        data = self.data_loss(policy, batch, generator)
        loss = losses.mean() + self.data_beta * data
        metrics = {
            "policy_loss": losses.mean(),
            "data_loss": data,
            "ratio": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > self.clip).to(ratio).mean(),
            "advantage": advantage.mean(),
        }
        if self.kl:
            metrics["kl"] = step_kl(new.mean, batch.extra["reference_mean"].to(new.mean), new.std).mean()
            loss = loss + self.kl * metrics["kl"]
        metrics = {"loss": loss, **metrics}
        return Step(loss, {name: v.detach() for name, v in metrics.items()}, advantage_weight(raw))

    def data_loss(
        self, policy: Denoiser, batch: Batch[Transition], generator: Random | torch.Generator
    ) -> Tensor:
        """Scalar: the mean denoising error on the good samples beside a batch, at the times of its steps.

        Raises:
            UserError: the batch has no data beside it.
        """
        if batch.beside is None:
            raise UserError(
                "method ddrl learns from real samples beside what it draws, and this batch has none; "
                "allowed with it: data.path, beside rollout.prompts"
            )
        best, good = winners(batch.beside.score, batch.beside.group)
        data = batch.beside.select(best)
        t = batch.x.t[torch.arange(len(best), device=batch.x.t.device) % len(batch.x.t)]
        each = -(-len(best) // batch.num_groups)  # a stream is a group's of what was sampled
        drawn = normal(generator, batch.num_groups, (each, *data.x.shape[1:]))
        eps = drawn.flatten(0, 1)[: len(best)].to(data.x)
        z = Noised(data.x, eps, add_noise(policy, data.x, eps, t.to(data.x)), t)
        errors = denoising_error(policy, z, data.cond, PerSample())
        weight = good.to(errors)
        return (errors * weight).sum() / weight.sum().clamp(min=1)


CARD = MethodCard(
    name="ddrl",
    title="DDRL",
    paper="Data-regularised reinforcement learning (released code: cosmos-rl)",
    year=2025,
    arxiv="2512.04332",
    data=DataKind.ROLLOUTS,
    cost="a step: 1 policy sample with gradient, twice that guided; 1 with gradient for each real sample",
    method=DDRL,
    rollout="trajectories",
    advantages=True,
    means=True,
    beside=True,
)
