"""Diffusion-DPO. Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization",
arXiv 2311.12908.

Equation 14 with a constant weight over time, as released: for one time t and one noise shared by the pair,
with m the policy's and r the reference's mean squared denoising error,

    loss = l( -(beta / 2) [(m_w - r_w) - (m_l - r_l)] ),    l(h) = -log sigmoid(h).

Other pairwise losses l (IPO, hinge, robust, smoothed labels) are values of the field ``loss``.

Differences from the released code: ties have no gradient (there they are dropped, or the first image wins),
errors are float32 under half precision, and any prediction target works. The released SD 1.5 script of
diffusers leaves out the 1/2, so its ``beta_dpo 2500`` is ``beta: 5000`` here.

Step-Video-T2V's Video-DPO (Ma et al. 2025, arXiv 2502.10248, section 4.4) is this loss on a flow model, time
and noise shared by the pair as here; its finding concerns the settings: with beta 5000 the gradients of pairs
with a negative logit are so large that the learning rate must be 1e-8, so it lowers beta and raises the rate
(neither value is stated).

On a flow model with t logit-normal or uniform this is Flow-DPO (Liu et al. 2025, "Improving Video Generation
with Human Feedback", arXiv 2501.13918), m being the error of the velocity. Its equation 6 has beta_t = beta
(1 - t)^2, ``over_time: alpha_squared``; its experiments found a constant beta better, the default. JavisDiT++
adds 0.1 times the winner's error, which is the strategy ``sft``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.methods._base import PairMethod
from diffalign.methods._common import OverTime, compare, pair_losses, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class DPO(PairMethod):
    """Diffusion-DPO on pairs of rivals, with likelihoods estimated by the ELBO.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        over_time: weight of beta at time t: "constant", or "alpha_squared" for beta alpha(t)^2.
    """

    beta: float = 5000.0
    over_time: OverTime = "constant"

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied."""
        # log-ratios (r - m) / 2 of winners and losers; equation 14 is l(beta (log-ratio_w - log-ratio_l))
        c = compare(self, policy, reference, batch, generator, self.over_time)
        losses = pair_losses(self.loss, self.beta * c.chosen, self.beta * c.rejected, c, batch)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="dpo",
    title="Diffusion-DPO",
    paper="Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization",
    year=2023,
    arxiv="2311.12908",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=DPO,
    soft=True,
)
