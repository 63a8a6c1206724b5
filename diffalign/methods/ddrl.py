"""DDRL. Ye et al. 2025, "Data-regularized Reinforcement Learning for Diffusion Models at Scale", arXiv
2512.04332, with the released code (cosmos-rl).

A policy gradient that is regularised by data instead of by a reference: in place of the KL of the policy to
its base, estimated from the policy's samples, it has the KL of the data to the policy, which is the denoising
loss on real samples and does not depend on the reward. With mu and mu_old the means of the policy's step and
of the step x as drawn, D latent elements and the advantage A,

    rho  = exp( mean( (x - mu_old)^2 - (x - mu)^2 ) ),    A = clip(A, -a, a),
    loss = mean max( -A rho, -A clip(rho, 1 - c, 1 + c) ) + data_beta mean |prediction - target|^2 + kl KL.

The ratio is one of squared errors without the factor 1 / (2 std^2), as released. ``exp_reward`` replaces A by
-exp(-A), the gradient of the paper's objective, which is always below 0: the likelihood of every sample is
lowered, that of the worst most, and the data term must raise the likelihood of good samples. KL is that of
the policy's steps to the base's; with ``kl`` above 0 a run keeps a reference.

The data are ``data.path``, beside ``rollout.prompts``: the winners of groups, and liked single images. They
are noised to the times of the recorded steps, each with fresh noise. Differences from the released code:
there the noise is the rollout's, and data are trained on at all steps of a trajectory in turn. A group whose
advantages are all 0 is left out, also with ``exp_reward``.
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
from diffalign.methods._steps import advantage_of, advantage_weight, check_advantages, check_kl, step_means
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.methods.sft import winners
from diffalign.types import Batch, Denoiser, Noised, Random, Step, Transition
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class DDRL(RolloutMethod):
    """DDRL on the steps of trajectories with advantages, and on real samples.

    Attributes:
        clip: c, half the width of the interval around 1 to which the ratio is clipped, in (0, 1).
        advantage_clip: a, largest absolute advantage, above 0; larger ones are clamped.
        data_beta: weight of the denoising loss on data, above 0.
        exp_reward: whether A is replaced by -exp(-A).
        kl: weight of the KL of the policy's steps to the base's, at least 0; 0: no reference.
        hold_negative: whether to stop the gradient through the negative prediction of guidance.
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
        means = step_means(policy, batch, CARD, self.hold_negative)
        x = batch.x.x_s.to(means.mean)
        # log rho: squared errors without the factor 1 / (2 std^2)
        log_ratio = ((x - means.drawn_mean) ** 2 - (x - means.mean) ** 2).flatten(1).mean(1)
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
            metrics["kl"] = step_kl(
                means.mean, batch.extra["reference_mean"].to(means.mean), means.std
            ).mean()
            loss = loss + self.kl * metrics["kl"]
        metrics = {"loss": loss, **metrics}
        return Step(loss, {name: v.detach() for name, v in metrics.items()}, advantage_weight(raw))

    def data_loss(
        self, policy: Denoiser, batch: Batch[Transition], generator: Random | torch.Generator
    ) -> Tensor:
        """Return the mean denoising error of a batch's real samples at the times of its steps, a scalar.

        Raises:
            UserError: the batch has no data beside it.
        """
        if batch.beside is None:
            raise UserError(
                "method ddrl is trained on real samples beside its rollouts, and this batch has none; "
                "allowed with it: data.path, beside rollout.prompts"
            )
        best, good = winners(batch.beside.score, batch.beside.group)
        data = batch.beside.select(best)
        t = batch.x.t[torch.arange(len(best), device=batch.x.t.device) % len(batch.x.t)]
        each = -(-len(best) // batch.num_groups)  # streams belong to the groups of the rollout
        drawn = normal(generator, batch.num_groups, (each, *data.x.shape[1:]))
        eps = sent(drawn.flatten(0, 1)[: len(best)], data.x)
        z = Noised(data.x, eps, add_noise(policy, data.x, eps, sent(t, data.x)), t)
        errors = denoising_error(policy, z, data.cond, PerSample())
        weight = good.to(errors)
        return (errors * weight).sum() / weight.sum().clamp(min=1)


CARD = MethodCard(
    name="ddrl",
    title="DDRL",
    paper="Ye et al., Data-regularized Reinforcement Learning for Diffusion Models at Scale",
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
