"""DMPO. Li et al. 2025, "Divergence Minimization Preference Optimization for Diffusion Model Alignment",
arXiv 2507.07510; the form released with Diffusion-SDPO (AIDC-AI/Diffusion-SDPO, train.py).

With Diffusion-DPO's logit h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)], p = sigmoid(h) and q = 1 - alpha,

    loss = KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),

which is the reverse of the divergence in DPO's cross-entropy, and mode-seeking. Its gradient is p (1 - p) (h
- log(q / (1 - q))): the optimal logit is finite (log 99 at alpha .01), and the gradient vanishes for a pair
whose loser the policy strongly prefers.

Differences from the released code: ties have weight 0. Its launchers set alpha .01; its default of 0 is 1e-6
after the clamp, as here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.losses.pairwise import ReverseKL
from diffalign.methods._base import ScaledMethod
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class DMPO(ScaledMethod):
    """Reverse KL of the policy's preference to the label.

    Attributes:
        beta: scale of the logit, above 0: rewards are beta (r - m) / 2.
        alpha: probability that a label is wrong, in [0, 0.5); values below 1e-6 are raised to it.
    """

    beta: float = 2000.0
    alpha: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < 0.5:
            raise UserError(f"method.alpha={self.alpha}; allowed: 0 <= alpha < 0.5")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied."""
        c = compare(self, policy, reference, batch, generator)
        loss = ReverseKL(self.alpha)
        losses = pair_losses(loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="dmpo",
    title="DMPO",
    paper="Li et al., Divergence Minimization Preference Optimization for Diffusion Model Alignment",
    year=2025,
    arxiv="2507.07510",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=DMPO,
    soft=True,
)
