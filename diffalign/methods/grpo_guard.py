"""GRPO-Guard. Wang et al. 2025, "GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching via
Regulated Clipping", arXiv 2510.22319 (after verl-omni; the official code was not available).

Flow-GRPO's ratio of densities has a mean below 1 that differs between steps, so that its clip is rarely
active for positive advantages. Here the bias of the log-ratio is removed and its spread is equal at all
steps: with mu and mu_old the means of the policy's step and of the step as drawn, S the step's std, z the
noise that was drawn and b = mean( (mu - mu_old)^2 ) / (2 S^2),

    log rho = S (log p - log p_old + b) = mean( z (mu - mu_old) ),    mean 0 over z,
    loss    = max( -A rho, -A clip(rho, 1 - c, 1 + c) ) / (t - s),    A = clip(A, -a, a).

The right-hand form is computed: it is exact, without a difference of large numbers. Its initial gradient is z
/ D, S times that of Flow-GRPO, so that published clips are as small as 2e-6. The division by the length t - s
of the step equalises the gradients of the steps; Flow-Factory omits it (``per_length: false``).

Each step has its own std and length (in the public ports the means over a batch). The rollout records mu_old
of each step. There is no KL. The method needs steps of an SDE, not those of ``rollout.form: cps``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.diffusion.samplers import FlowSDE
from diffalign.errors import UserError
from diffalign.losses.policy_gradient import guarded_log_ratio, ppo
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import advantage_of, advantage_weight, check_advantages, kernel_of, step_means
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, Transition


@dataclass(frozen=True)
class GRPOGuard(RolloutMethod):
    """GRPO-Guard on the steps of a flow's trajectories with advantages.

    Attributes:
        clip: c, half the width of the interval around 1 to which the regulated ratio is clipped, in (0, 1).
        advantage_clip: a, largest absolute advantage, above 0; larger ones are clamped.
        per_length: divide the loss of a step by its length in time.
        hold_negative: whether to stop the gradient through the negative prediction of guidance.
    """

    clip: float = 2e-6
    advantage_clip: float = 5.0
    per_length: bool = True
    hold_negative: bool = True

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_advantages(self)

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all recorded steps.

        Raises:
            UserError: the batch is not of a flow's SDE rollout with advantages and recorded means.
        """
        advantage = advantage_of(batch, CARD).clamp(-self.advantage_clip, self.advantage_clip)
        kernel = kernel_of(batch, CARD)
        if not isinstance(kernel, FlowSDE) or kernel.form == "cps":
            raise UserError(
                "method grpo_guard is trained on steps of a flow's SDE; allowed with it: a flow model and "
                "rollout.form sde or dance"
            )
        means = step_means(policy, batch, CARD, self.hold_negative)
        log_ratio = guarded_log_ratio(batch.x.x_s, means.mean, means.drawn_mean, means.std)
        losses, ratio = ppo(log_ratio, advantage.to(log_ratio), self.clip)
        if self.per_length:
            losses = losses / kernel.length(batch.x.t, batch.x.s).to(losses)
        loss = losses.mean()
        metrics = {
            "loss": loss,
            "ratio": ratio.mean(),
            "clip_fraction": ((ratio - 1).abs() > self.clip).to(ratio).mean(),
            "advantage": advantage.mean(),
        }
        return Step(loss, {name: v.detach() for name, v in metrics.items()}, advantage_weight(advantage))


CARD = MethodCard(
    name="grpo_guard",
    title="GRPO-Guard",
    paper="Wang et al., GRPO-Guard: Mitigating Implicit Over-Optimization in Flow Matching",
    year=2025,
    arxiv="2510.22319",
    data=DataKind.ROLLOUTS,
    cost="a step: 1 policy sample with gradient; twice that guided",
    method=GRPOGuard,
    rollout="trajectories",
    advantages=True,
    means=True,
)
