"""DDPO. Black et al. 2023, "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.

The importance-sampling variant (section 4.3, DDPO-IS, and the released code): the policy samples images by
DDIM with eta = 1, and each recorded step x_t -> x_s of an image is an action with the image's advantage A,
its reward standardised over the images of its prompt. With log p a mean over the latent elements and r =
exp(log p_theta(x_s | x_t) - log p_drawn(x_s | x_t)),

    A = clip(A, -a, a),    loss = max( -A r, -A clip(r, 1 - c, 1 + c) ).

It is the policy-gradient baseline of the preference methods and needs numeric rewards, not only comparisons.
c is as small as 1e-4 because log-densities are means over elements, not sums.

``kl`` adds a penalty on the exact KL of the policy's steps to the reference's, as Flow-GRPO does (Liu et al.
2025, arXiv 2505.05470); its code divides by the variance without the step's length t - s, so that its KL is t
- s times the exact one and its weight b is b (t - s) here. At 0 the KL is logged only; with ``kl: null``
there is no reference, as in the released DDPO.

Differences from the released code: steps of a group whose advantages are all 0 are left out of the mean
(there they are averaged in as 0). The density under which a step was drawn is recorded in the rollout, in
float32.
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
    """DDPO on the steps of trajectories with advantages, with exact log-densities.

    Attributes:
        clip: c, half the width of the interval around 1 to which the ratio of policy and sampling policy is
            clipped, in (0, 1).
        advantage_clip: a, largest absolute advantage, above 0; larger ones are clamped.
        kl: weight of the KL of the policy's steps to the reference's, at least 0; 0: logged only; null: no
            reference, which halves the network samples of the rollout.
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
        """Return the mean loss over all recorded steps.

        Raises:
            UserError: the batch is not of a rollout with advantages.
        """
        advantage_of(batch, CARD)  # raises before any network call
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
