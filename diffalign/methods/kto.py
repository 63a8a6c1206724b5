"""Diffusion-KTO. Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465.

Single likes and dislikes (section 4, and the released code): with m the policy's and r the reference's mean
squared denoising error of a sample, each with its own time and noise,

    v = (beta / 2) (r - m) - kl,    loss = mean( w_y (1 - h(v, y)) ),    h = sigmoid(y v) by default,

y = 1 for a desirable sample (score above 1/2), -1 for an undesirable one (below); a score of 1/2 says nothing
and counts nothing. A ranked list is as many likes as it has members.

The unit of beta is that of every method here, a log-ratio being (r - m) / 2. The released code has no 1/2:
its ``beta_dpo`` B is ``beta: 2 B`` here (the paper's 5000 is 10000; the script's default 1000 is 2000).

``kl`` is the point against which gains and losses are felt, without gradient, over the micro-batches of all
ranks (not over an accumulation window, so a large ``batch_size`` serves it better than accumulation):
"mean" is max(0, mean reward), the paper's; "class_means" the middle of the mean rewards of both classes
(``bce_offset`` sigmoid); "mismatched" the mean reward of these images under another group's prompt
(``bce_offset`` original: one more forward of both networks). Neither of the last two is clamped.
``whole_batch`` is the formula that the released ``kto_gp`` intends: 1 - sigmoid of the mean of w_y y v, one
utility for all samples. Its code averages v itself, without label and weight, so its value is
1 - sigmoid(mean v) and dislikes push as likes do; that is not reproduced.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.noising import Forward
from diffalign.losses.pointwise import UTILITIES, Sigmoid, Utility
from diffalign.methods._base import NOISINGS, ScaledMethod
from diffalign.methods._likes import KL, likelihoods, likes_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step


@dataclass(frozen=True, kw_only=True)
class KTO(ScaledMethod):
    """Single likes and dislikes, likelihoods by the ELBO.

    Attributes:
        beta: weight of the KL to the reference, in units of a mean squared error with a 1/2: twice the
            released code's.
        utility: of a sample's value.
        kl: what a value is measured from.
        desirable_weight: w_y of desirable samples (lambda_d).
        undesirable_weight: w_y of undesirable ones (lambda_u).
        whole_batch: one sigmoid of the mean value, in place of the mean of utilities.
        noising: how latents become noisy states; noise of its own for each sample.
    """

    beta: float = 10000.0
    utility: Utility = choice(UTILITIES, Sigmoid())
    kl: KL = "mean"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    whole_batch: bool = False
    noising: Noising = choice(NOISINGS, Forward(shared=False))

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all samples that are liked or disliked."""
        ll, others = likelihoods(self, policy, reference, batch, generator)
        return likes_step(self, ll.log_ratio, others, batch.score)


CARD = MethodCard(
    name="kto",
    title="Diffusion-KTO",
    paper="Li et al., Aligning Diffusion Models by Optimizing Human Utility",
    year=2024,
    arxiv="2404.04465",
    data=DataKind.LIKES,
    cost="1 policy sample with gradient, 1 reference sample",
    method=KTO,
)
