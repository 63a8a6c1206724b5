"""SPO. Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences with
Step-by-step Preference Optimization", arXiv 2406.04314.

At each step the policy draws several candidates from one state x_t, a step-aware judge compares their clean
estimates, and the best and the worst of them are a pair (section 3, and the released code). The loss is
D3PO's, with beta 10:

    rho = clip(p_theta(x_s | x_t) / p_ref(x_s | x_t), 1 - c, 1 + c),
    loss = l( beta (log rho_w - log rho_l) ),    l(h) = -log sigmoid(h).

Winner and loser share x_t, so that one forward of policy and reference serves both. Where candidates take
several steps of their own before they are judged (``rollout.inner_steps``, the released SDXL run) only the
first of a pair's steps shares its state.

The loss lies between 0.126 and 2.133 and stays around log 2 in a healthy run; two rivals clipped on the same
side give log 2 and no gradient. Read the judge's scores instead.

What differs from the released code: one forward of each network where it makes two; ties are
told by the source and count nothing; ``training.max_grad_norm`` does what it says, where the released code
clips an iterator that is used up. ``kl`` is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from diffalign.losses.pairwise import Logistic
from diffalign.methods._base import RolloutMethod
from diffalign.methods._steps import check_preference, preference
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step, Transition


@dataclass(frozen=True)
class SPO(RolloutMethod):
    """Pairs of rival steps from one state, exact log-densities.

    Attributes:
        beta: what makes a reward of a log-ratio.
        clip: how far from 1 the ratio of policy and reference may be.
        kl: weight of the KL of the policy's steps to the reference's; at 0 it is only logged.
    """

    beta: float = 10.0
    clip: float = 0.1
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
        return preference(self, Logistic(), policy, reference, batch, CARD)


CARD = MethodCard(
    name="spo",
    title="SPO",
    paper="Liang et al., Aesthetic Post-Training Diffusion Models from Generic Preferences with Step-by-step "
    "Preference Optimization",
    year=2024,
    arxiv="2406.04314",
    data=DataKind.ROLLOUTS,
    cost="1 policy sample with gradient, 1 reference sample; twice that guided",
    method=SPO,
    rollout="tree",
)
