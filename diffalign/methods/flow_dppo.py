"""Flow-DPPO. Ping et al. 2026, "Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models",
arXiv 2606.11025 (after the released code, UniRL; verl-omni's is the same).

For a recorded step with the means mu of the policy's step and mu_old of the step as drawn, its std S and the
advantage A,

    D    = mean( (mu - mu_old)^2 ) / (2 S^2),    the KL of the two steps per latent element,
    rho  = exp(log p - log p_old),
    loss = -A rho,  without gradient where D >= threshold and A (rho - 1) > 0, there 0.

A step beyond the threshold loses its gradient only if the gradient would increase D. While the policy equals
the sampling policy, D is 0, nothing is masked, and the loss is Flow-GRPO's without a clip. Advantages are not
clipped. UniRL's optional KL to the reference is not implemented. The rollout records mu_old of each step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.diffusion.likelihood import log_density, step_kl
from diffalign.diffusion.samplers import FlowSDE
from diffalign.errors import UserError
from diffalign.losses.policy_gradient import trusted
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import advantage_of, advantage_weight, kernel_of, step_means
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, Transition


@dataclass(frozen=True)
class FlowDPPO(RolloutMethod):
    """Flow-DPPO on the steps of a flow's trajectories with advantages, masked by their divergence.

    Attributes:
        threshold: KL per latent element from which a step may not move further, above 0.
        hold_negative: whether to stop the gradient through the negative prediction of guidance.
    """

    threshold: float = 1e-5
    hold_negative: bool = True

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"method.threshold={self.threshold}; allowed: more than 0")

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all recorded steps."""
        advantage = advantage_of(batch, CARD)
        kernel = kernel_of(batch, CARD)
        if not isinstance(kernel, FlowSDE):
            raise UserError(
                "method flow_dppo is trained on stochastic steps of a flow; allowed elsewhere: ddpo"
            )
        means = step_means(policy, batch, CARD, self.hold_negative)
        kl = step_kl(means.mean.detach(), means.drawn_mean, means.std)
        logp = log_density(kernel, batch.x.x_s, means.mean, means.std)
        log_ratio = logp - batch.x.logp.to(logp)
        losses, masked = trusted(log_ratio, advantage.to(logp), kl, self.threshold)
        loss = losses.mean()
        metrics = {
            "loss": loss,
            "ratio": log_ratio.exp().mean(),
            "kl_to_drawn": kl.mean(),
            "masked_fraction": masked.to(kl).mean(),
            "advantage": advantage.mean(),
        }
        return Step(loss, {name: v.detach() for name, v in metrics.items()}, advantage_weight(advantage))


CARD = MethodCard(
    name="flow_dppo",
    title="Flow-DPPO",
    paper="Ping et al., Flow-DPPO: Divergence Proximal Policy Optimization for Flow Matching Models",
    year=2026,
    arxiv="2606.11025",
    data=DataKind.ROLLOUTS,
    cost="a step: 1 policy sample with gradient; twice that guided",
    method=FlowDPPO,
    rollout="trajectories",
    advantages=True,
    means=True,
)
