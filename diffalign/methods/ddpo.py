"""DDPO. Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.

The importance-sampling variant (section 4.3, DDPO-IS, and the released code): the policy draws images by DDIM
with eta = 1, and each recorded step x_t -> x_s of an image is an action with the image's advantage A, its
reward against those of its prompt in units of their standard deviation. With log p a mean over the latent
elements and r = exp(log p_theta(x_s | x_t) - log p_drawn(x_s | x_t)),

    A = clip(A, -a, a),    loss = max( -A r, -A clip(r, 1 - c, 1 + c) ).

The baseline of the preference methods: it needs rewards that are numbers, not only comparisons. c is as
small as 1e-4 because log-densities are means over elements, not sums.

``kl`` adds a penalty on the exact KL of the policy's steps to the reference's, as Flow-GRPO does (Liu et al.
2025, arXiv 2505.05470); its code divides by the variance without the step's length, so that its weight b is
b / (t - s) here. At 0 the KL is only logged; ``kl: null`` does without any reference, as the released DDPO.

What differs from the released code: a step whose group has no advantage at all is left out of the mean, where
the released mean counts its 0. The density under which a step was drawn is the one that sampling has
kept, in float32.
"""

from dataclasses import dataclass

import torch

from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import (
    advantage_of,
    check_advantages,
    check_kl,
    density,
    likelihood,
    surrogate,
)
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, Transition


@dataclass(frozen=True)
class DDPO(RolloutMethod):
    """Single steps of whole trajectories with advantages, exact log-densities.

    Attributes:
        clip: how far from 1 the ratio of policy and sampling policy is rewarded.
        advantage_clip: advantages further from 0 count as this.
        kl: weight of the KL of the policy's steps to the reference's; 0: logged only; null: no reference,
            which saves the rollout half of its network samples.
    """

    clip: float = 1e-4
    advantage_clip: float = 5.0
    kl: float | None = 0.0

    def __post_init__(self) -> None:
        check_advantages(self)
        check_kl(self.kl)

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
        """Return the mean loss over all recorded steps."""
        advantage_of(batch, CARD)  # before any forward
        ll = None if self.kl is None else likelihood(policy, reference, batch, CARD)
        logp = density(policy, batch, CARD) if ll is None else ll.policy
        loss, metrics, weight = surrogate(self, logp, batch, CARD)
        if ll is not None:
            metrics["kl"] = ll.kl.mean()
            loss = loss + self.kl * ll.kl.mean() if self.kl else loss
        metrics = {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
        return Step(loss, metrics, weight)


CARD = MethodCard(
    name="ddpo",
    title="DDPO",
    paper="Black et al., Training Diffusion Models with Reinforcement Learning",
    year=2023,
    arxiv="2305.13301",
    data=DataKind.ROLLOUTS,
    cost="a step: 1 policy sample with gradient, 1 reference sample, in the rollout; twice that guided",
    method=DDPO,
    rollout="trajectories",
    advantages=True,
)
