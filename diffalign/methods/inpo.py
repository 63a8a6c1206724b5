"""DDIM-InPO. Lu et al. 2025, "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient
Diffusion Model Alignment", arXiv 2503.18454.

The implicit reward sits on the pair (x0, x_t), and x_t is estimated by inversion of x0 instead of drawn: the
loss is Diffusion-DPO's (Wallace et al. 2023, arXiv 2311.12908, equation 14) with the noise replaced by what
the inverted state implies, tau = (x_t - alpha_t x0) / sigma_t. With m the policy's and r the reference's mean
squared error against tau,

    loss = -log sigmoid( -(beta / 2) [(m_w - r_w) - (m_l - r_l)] ).

As released (JaydenLyh/InPO, train.py): the policy itself inverts, without gradient, 10 grid steps that tell
the network the time a step starts from, a tenth of DDIM's posterior noise after each, beta 2000 on SD 1.5
from a fine-tuned start and 5000 on SDXL. Its inversion ends on the grid, up to 99 steps from the time the
network is told; ``noising: {type: inversion, mode: exact, eta: 0.1}`` ends where it should. The released code
is right for one pair a process only, and its table is half precision; here each pair has its own time.
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
        beta: weight of the KL to the reference, in units of a mean squared error with the paper's 1/2.
        noising: how latents are inverted.
    """

    beta: float = 2000.0
    noising: Noising = choice(NOISINGS, Inversion(mode="paper", eta=0.1))

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are no tie."""
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
