"""DMPO. Li et al. 2025, "Divergence Minimization Preference Optimization for Diffusion Model Alignment",
arXiv 2507.07510; the form released with Diffusion-SDPO (AIDC-AI/Diffusion-SDPO, train.py).

With Diffusion-DPO's logit h = -(beta / 2) [(m_w - r_w) - (m_l - r_l)], p = sigmoid(h) and q = 1 - alpha,

    loss = KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)),

the reverse of the divergence that DPO's cross-entropy takes, which seeks one mode instead of covering all.
Its gradient is p (1 - p) (h - log(q / (1 - q))): the pull ends at a finite logit (log 99 at alpha .01), and a
pair that the policy has firmly the wrong way round is left alone.

What differs from the released code: ties have weight 0. Its launchers set alpha .01; its default of 0 is 1e-6
after the clamp, as here.
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
from diffalign.losses.pairwise import ReverseKL
from diffalign.methods._common import NOISINGS, TIMES, compare, preference_step
from diffalign.methods.registry import MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step, TimeSampler


@dataclass(frozen=True)
class DMPO:
    """Reverse KL of the preference from its label.

    Attributes:
        beta: scale of the logit, in units of a mean squared error with the paper's 1/2.
        alpha: probability that a label is wrong; at least 1e-6 is used.
        time: which times are trained on, one per group.
        noising: how latents become noisy states.
        reduce: what counts as one unit of a sample.
    """

    beta: float = 2000.0
    alpha: float = 1e-6
    time: TimeSampler = choice(TIMES, Uniform())
    noising: Noising = choice(NOISINGS, Forward())
    reduce: Reduce = PerSample()

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise UserError(f"method.beta={self.beta}; allowed: more than 0")
        if not 0 <= self.alpha < 0.5:
            raise UserError(f"method.alpha={self.alpha}; allowed: 0 <= alpha < 0.5")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """The mean loss over all pairs of rivals that are no tie."""
        c = compare(self, policy, reference, batch, generator)
        losses = ReverseKL(self.alpha)(self.beta * c.chosen, self.beta * c.rejected)
        return preference_step(c, losses, self.beta)


CARD = MethodCard(
    name="dmpo",
    title="DMPO",
    paper="Li et al., Divergence Minimization Preference Optimization for Diffusion Model Alignment",
    year=2025,
    arxiv="2507.07510",
    data="pairs",
    cost="2 policy samples with gradient, 2 reference samples",
    method=DMPO,
)
