"""D3PO. Yang et al. 2023, "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
arXiv 2311.13231.

Two images of a prompt are drawn by the policy, from one noise, by DDIM with eta = 1; the winner of
the comparison of the finished images wins each of their steps (section 4, and the released code). With log p
the Gaussian log-density of the recorded step x_t -> x_s, a mean over the latent elements,

    rho = clip(p_theta(x_s | x_t) / p_ref(x_s | x_t), 1 - c, 1 + c),
    loss = l( beta (log rho_w - log rho_l) ),    l(h) = -log sigmoid(h),

a mean over pairs and steps. Densities are those of the guided networks, with gradient through both halves.
Several rewards are compared by Pareto: one of two rivals wins if it is at least as good by all and better by
one (a score per reward; elsewhere a score is one number).

A loss near log 2 is no failure: with beta 0.1 and c 0.1 it lies between 0.683 and 0.703. Read the judge's
scores instead. Outside the clip a step has no gradient, not even towards the right side; ``clipped`` is
their share. The step before the last (t = 51 of 20) weighs errors some forty times as much as the others,
and reaches the clip first.

What differs from the paper: its formula has no clip, the released code has. What differs from that code:
ties count nothing in the mean (log 2 there); gradients are synchronised between processes, which the
released adapters are not; one reference prediction of a step serves all its pairs, or that of the rollout.
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
    """Pairs of rival steps of whole trajectories, exact log-densities.

    Attributes:
        beta: what makes a reward of a log-ratio.
        clip: how far from 1 the ratio of policy and reference may be.
        loss: what a pair demands of its logit.
        kl: weight of the KL of the policy's steps to the reference's; at 0 it is only logged.
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
        """Return the mean loss over all pairs of rival steps that are no tie."""
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
