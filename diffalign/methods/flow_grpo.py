"""Flow-GRPO. Liu et al. 2025, "Flow-GRPO: Training Flow Matching Models via Online RL", arXiv 2505.05470.

The policy samples K images of a prompt by stochastic steps of a flow (``samplers.FlowSDE``); each recorded
step x_t -> x_s has its image's advantage A, the reward minus the mean of its rivals over the std of all
rewards (``rollout.advantage: group_batch``). With log p a mean over the latent elements, r = exp(log p_theta
- log p_drawn) and mu the means of the two policies' steps (equations 4 and 5, and the released code),

    A = clip(A, -a, a),
    loss = max( -A r, -A clip(r, 1 - c, 1 + c) ) + kl mean( (mu_theta - mu_ref)^2 ) / (2 std^2).

As released, the std of the KL is the SDE's g instead of the step's g sqrt(t - s) (``kl_form: published``);
``exact`` is the KL of the two Gaussians, 1 / (t - s) times as large. For steps of form "cps" both are equal.
As released, only the conditional prediction of guidance has a gradient (``hold_negative``).

``noise_weight`` w multiplies the clipped loss of a step by w times the step's std (TempFlow-GRPO, He et al.
2025, arXiv 2508.04324; UniRL has w = 2.25: weights from 1.6 to .5 over ten steps at level 0.7), so that steps
with more noise have larger weights.

Other methods are settings of this one, without a KL:

    DanceGRPO (Xue et al. 2025, arXiv 2505.07818): rollout.form dance, one noise a prompt, advantages against
        the std of the rivals alone (group), a random 0.6 of the steps (rollout.trained_steps)
    MixGRPO (Li et al. 2025, arXiv 2507.21802): rollout.window; steps outside the window are those of the ODE
    Flow-GRPO-Fast (the same authors' code, later): a window of 2 or 3 steps at a position that each round
        draws (rollout.window_order random, rollout.window_within 5 of 10 steps), no guidance, form cps at
        level 0.8 with rollout.density squared and clip 1e-5. With window 1 a single step is stochastic.
        Rivals that share their noise are one state until the window begins and are sampled once

Differences from the released codes: the step to time 0 is the ODE's (they do not train on it either); the
density of "cps" is the Gaussian's unless ``rollout.density`` is squared, as in the code; steps of a group
whose advantages are all 0 are left out of the mean; statistics of a group are not pooled over equal prompts
of a round.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from diffalign.diffusion.samplers import FlowSDE
from diffalign.errors import UserError
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import (
    advantage_of,
    check_advantages,
    check_kl,
    density,
    kernel_of,
    likelihood,
    surrogate,
)
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Path, Random, Step, Transition


@dataclass(frozen=True)
class FlowGRPO(RolloutMethod):
    """Flow-GRPO on the steps of a flow's trajectories with advantages, with exact log-densities.

    Attributes:
        clip: c, half the width of the interval around 1 to which the ratio of policy and sampling policy is
            clipped, in (0, 1).
        advantage_clip: a, largest absolute advantage, above 0; larger ones are clamped.
        kl: weight of the KL of the policy's steps to the reference's, at least 0; 0: logged only; null: no
            reference, which halves the network samples of the rollout.
        kl_form: divisor of the KL's squared difference, see the module.
        hold_negative: whether to stop the gradient through the negative prediction of guidance.
        noise_weight: weight w of a step's loss per unit of its std, above 0; null: equal weights.
    """

    clip: float = 1e-4
    advantage_clip: float = 5.0
    kl: float | None = 0.04
    kl_form: Literal["published", "exact"] = "published"
    hold_negative: bool = True
    noise_weight: float | None = None

    def __post_init__(self) -> None:
        check_advantages(self)
        check_kl(self.kl)
        if self.noise_weight is not None and not self.noise_weight > 0:
            raise UserError(f"method.noise_weight={self.noise_weight}; allowed: more than 0, or null")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl is not None

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all recorded steps.

        Raises:
            UserError: the batch is not of a flow's rollout with advantages.
        """
        advantage_of(batch, CARD)  # raises before any network call
        kernel = kernel_of(batch, CARD)
        if not isinstance(kernel, FlowSDE):
            raise UserError(
                "method flow_grpo is trained on stochastic steps of a flow; allowed elsewhere: ddpo"
            )
        weights = None if self.noise_weight is None else self.noise_weight * stds(kernel, policy.path, batch)
        if self.kl is None:
            logp = density(policy, batch, CARD, self.hold_negative)
            loss, metrics, weight = surrogate(self, logp, batch, CARD, weights)
        else:
            ll = likelihood(policy, reference, batch, CARD, self.hold_negative)
            loss, metrics, weight = surrogate(self, ll.policy, batch, CARD, weights)
            # "published" divides by the SDE's variance per unit of time, "exact" by the step's variance
            length = kernel.length(batch.x.t, batch.x.s).to(ll.kl) if self.kl_form == "published" else 1
            metrics |= {"policy_loss": loss, "kl": (ll.kl * length).mean()}
            loss = loss + self.kl * metrics["kl"]
        return Step(loss, {name: v.detach() for name, v in {"loss": loss, **metrics}.items()}, weight)


def stds(kernel: FlowSDE, path: Path, batch: Batch[Transition]) -> torch.Tensor:
    """Return the std (B,) of each recorded step, which depends on its times only."""
    zeros = batch.x.t.new_zeros(len(batch.x.t), 1)
    return kernel.after(path, zeros, zeros, batch.x.t, batch.x.s)[1].expand_as(zeros)[:, 0]


CARD = MethodCard(
    name="flow_grpo",
    title="Flow-GRPO",
    paper="Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL",
    year=2025,
    arxiv="2505.05470",
    data=DataKind.ROLLOUTS,
    cost="a step: 1 policy sample with gradient, 1 reference sample, in the rollout; twice that guided",
    method=FlowGRPO,
    rollout="trajectories",
    advantages=True,
)
