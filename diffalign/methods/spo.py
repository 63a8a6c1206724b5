"""SPO. Liang et al. 2024, "Aesthetic Post-Training Diffusion Models from Generic Preferences with
Step-by-step Preference Optimization", arXiv 2406.04314.

At each step the policy draws several candidates from one state x_t; a step-aware reward model scores their
clean estimates, and the best and the worst of them are a pair (section 3, and the released code). The loss is
D3PO's, with beta 10:

    rho = clip(p_theta(x_s | x_t) / p_ref(x_s | x_t), 1 - c, 1 + c),
    loss = l( beta (log rho_w - log rho_l) ),    l(h) = -log sigmoid(h).

Winner and loser share x_t, so that policy and reference are called once for both. If candidates make several
steps before they are scored (``rollout.inner_steps``, the released SDXL run), only the first of them shares
its state.

The loss lies between 0.126 and 2.133 and stays near log 2 in a successful run; two rivals clipped on the same
side have loss log 2 and no gradient. It does not measure progress; the judge's scores do.

Differences from the released code: one call of each network per pair (there two); ties have weight 0;
gradients are clipped at ``training.max_grad_norm`` (the released code clips an exhausted iterator, so
nothing). ``kl`` is ours.
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
    """SPO on pairs of rival steps from one state, with exact log-densities.

    Attributes:
        beta: factor from a log-ratio to a reward, above 0.
        clip: c, half the width of the interval around 1 to which the ratio of policy and reference is
            clipped, in (0, 1).
        kl: weight of the KL of the policy's steps to the reference's, at least 0; at 0 it is logged only.
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
        """Return the mean loss over all pairs of rival steps that are not tied."""
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
