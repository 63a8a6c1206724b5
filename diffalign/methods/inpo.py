"""DDIM-InPO. Lu et al. 2025, "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient
Diffusion Model Alignment", arXiv 2503.18454.

The implicit reward is one of the pair (x0, x_t), and x_t is computed by inversion of x0 instead of drawn. The
loss is Diffusion-DPO's (Wallace et al. 2023, arXiv 2311.12908, equation 14) with the noise replaced by that
which the inverted state implies, tau = (x_t - alpha_t x0) / sigma_t. With m the policy's and r the
reference's mean squared error against tau,

    loss = -log sigmoid( -(beta / 2) [(m_w - r_w) - (m_l - r_l)] ).

As released (JaydenLyh/InPO, train.py): the policy inverts, without gradient, in 10 grid steps whose time
input is the time at which a step starts, with DDIM's posterior noise times 0.1 after each; beta is 2000 on SD
1.5 from a fine-tuned start and 5000 on SDXL. That inversion ends on the grid, up to 99 timesteps from the
sampled time; ``noising: {type: inversion, mode: exact, eta: 0.1}`` ends at the sampled time. The released
code is correct for one pair per process only, and its table is half precision; here each pair has its own
time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.inversion import Inversion
from diffalign.methods._base import NOISINGS, PairMethod
from diffalign.methods._common import compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step


@dataclass(frozen=True, kw_only=True)
class InPO(PairMethod):
    """Diffusion-DPO on inverted states.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        noising: DDIM inversion that maps clean latents to noisy states.
    """

    beta: float = 2000.0
    noising: Noising = choice(NOISINGS, Inversion(mode="paper", eta=0.1))

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied."""
        c = compare(self, policy, reference, batch, generator)
        losses = pair_losses(self.loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="inpo",
    title="DDIM-InPO",
    paper="Lu et al., InPO: Inversion Preference Optimization with Reparametrized DDIM",
    year=2025,
    arxiv="2503.18454",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples, 2 per inversion step without (about 6 steps)",
    method=InPO,
    soft=True,
)
