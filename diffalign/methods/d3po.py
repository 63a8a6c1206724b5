"""D3PO. Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
arXiv 2311.13231.

The policy samples two images of a prompt from one noise by DDIM with eta = 1. The preference between the
finished images is the label of each pair of their steps (section 4, and the released code). With log p the
Gaussian log-density of the recorded step x_t -> x_s, a mean over the latent elements,

    rho = clip(p_theta(x_s | x_t) / p_ref(x_s | x_t), 1 - c, 1 + c),
    loss = l( beta (log rho_w - log rho_l) ),    l(h) = -log sigmoid(h),

averaged over pairs and steps. Densities are those of the guided networks, with gradient through both
predictions of guidance. Several rewards are compared by Pareto dominance: a rival wins if it is at least as
good by all and better by one.

With beta 0.1 and c 0.1 the loss lies between 0.683 and 0.703, so it does not measure progress; the judge's
scores do. Outside the clip a step has no gradient in either direction; ``clipped`` is the share of such
steps. The step before the last (t = 51 of 20 steps) weights errors about forty times as much as the others
and reaches the clip first.

Difference from the paper: its formula has no clip, the released code has. Differences from that code: ties
have weight 0 (there log 2 is averaged in); gradients are synchronised between processes (there those of the
adapters are not); the reference is called once per step for all pairs, or its means are those of the rollout.
``kl`` and other pairwise losses are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.config.build import choice
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import check_preference, preference
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, Transition


@dataclass(frozen=True)
class D3PO(RolloutMethod):
    """D3PO on pairs of steps of two trajectories, with exact log-densities.

    Attributes:
        beta: factor from a log-ratio to a reward, above 0.
        clip: c, half the width of the interval around 1 to which the ratio of policy and reference is
            clipped, in (0, 1).
        loss: pairwise loss of the rewards of two rivals.
        kl: weight of the KL of the policy's steps to the reference's, at least 0; at 0 it is logged only.
    """

    beta: float = 0.1
    clip: float = 0.1
    loss: PairwiseLoss = choice(LOSSES, Logistic())
    kl: float = 0.0

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_preference(self)

    def __call__(
        self,
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Transition],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the mean loss over all pairs of rival steps that are not tied."""
        return preference(self, self.loss, policy, reference, batch, CARD)


CARD = MethodCard(
    name="d3po",
    title="D3PO",
    paper="Yang et al., Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
    year=2023,
    arxiv="2311.13231",
    data=DataKind.ROLLOUTS,
    cost="a step: 2 policy samples with gradient, 2 reference samples, in the rollout; twice that guided",
    method=D3PO,
    rollout="trajectories",
)
