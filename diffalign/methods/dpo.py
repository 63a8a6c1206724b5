"""Diffusion-DPO. Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization",
arXiv 2311.12908.

Equation 14 with a constant weight over time, as released: for one time t and one noise shared by the pair,
with m the policy's and r the reference's mean squared denoising error,

    loss = l( -(beta / 2) [(m_w - r_w) - (m_l - r_l)] ),    l(h) = -log sigmoid(h).

Other pairwise losses l (IPO, hinge, robust, smoothed labels) are its ``loss`` field.

What differs from the released code: ties have no gradient instead of being dropped or won by the first
image, errors are float32 under half precision, and any prediction target works. The released SD 1.5 script
of diffusers leaves out the 1/2, so its ``beta_dpo 2500`` is ``beta: 5000`` here.

Step-Video-T2V's Video-DPO (Ma et al. 2025, arXiv 2502.10248, section 4.4) is this loss on a flow model, time
and noise shared by the pair as here; its finding is a matter of settings: where the logit is negative and
beta 5000, gradients explode and force a learning rate of 1e-8, so it lowers beta and raises the rate (neither
value is stated).

On a flow model with t logit-normal or uniform this is Flow-DPO (Liu et al. 2025, "Improving Video Generation
with Human Feedback", arXiv 2501.13918), m being the error of the velocity. Its equation 6 has beta_t = beta
(1 - t)^2, ``over_time: alpha_squared``; its experiments found a constant beta better, the default. JavisDiT++
adds 0.1 times the winner's error: the strategy ``sft``.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import PerSample, Reduce
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.methods._common import NOISINGS, TIMES, OverTime, compare, preference_step
from diffalign.methods.registry import MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step, TimeSampler


@dataclass(frozen=True)
class DPO:
    """Pairs of rivals, likelihoods by the ELBO.

    Attributes:
        beta: weight of the KL to the reference, in units of a mean squared error with the paper's 1/2.
        loss: what a pair demands of its logit.
        over_time: beta at time t: the same everywhere, or beta alpha(t)^2.
        time: which times are trained on, one per group.
        noising: how latents become noisy states.
        reduce: what counts as one unit of a sample.
    """

    beta: float = 5000.0
    loss: PairwiseLoss = choice(LOSSES, Logistic())
    over_time: OverTime = "constant"
    time: TimeSampler = choice(TIMES, Uniform())
    noising: Noising = choice(NOISINGS, Forward())
    reduce: Reduce = PerSample()

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"method.beta={self.beta}; allowed: more than 0")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """The mean loss over all pairs of rivals that are no tie."""
        c = compare(self, policy, reference, batch, generator, self.over_time)
        return preference_step(c, self.loss(self.beta * c.chosen, self.beta * c.rejected), self.beta)


CARD = MethodCard(
    name="dpo",
    title="Diffusion-DPO",
    paper="Wallace et al., Diffusion Model Alignment Using Direct Preference Optimization",
    year=2023,
    arxiv="2311.12908",
    data="pairs",
    cost="2 policy samples with gradient, 2 reference samples",
    method=DPO,
)
