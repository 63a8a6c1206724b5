"""Diffusion-KTO. Li et al. 2024, "Aligning Diffusion Models by Optimizing Human Utility", arXiv 2404.04465.

Single likes and dislikes (section 4, and the released code): with m the policy's and r the reference's mean
squared denoising error of a sample, each with its own time and noise,

    v = (beta / 2) (r - m) - kl,    loss = mean( w_y (1 - h(v, y)) ),    h = sigmoid(y v) by default,

with y = 1 for a desirable sample (score above 1/2) and -1 for an undesirable one (below); a score of 1/2 has
weight 0. The members of a ranked list are single likes.

As in all methods here, a log-ratio is (r - m) / 2. The released code has no 1/2: its ``beta_dpo`` B is
``beta: 2 B`` here (the paper's 5000 is 10000; the script's default 1000 is 2000).

``kl`` is the reference point of the value, without gradient, over the micro-batches of all ranks. It is not
computed over an accumulation window, so prefer a large ``batch_size`` to accumulation. "mean" is max(0, mean
reward), as in the paper; "class_means" the mean of the mean rewards of both classes (``bce_offset`` sigmoid);
"mismatched" the mean reward of the images with another group's prompt (``bce_offset`` original; it costs one
more call of both networks). The last two are not clamped. ``whole_batch`` is the formula that the released
``kto_gp`` intends: 1 - sigmoid of the mean of w_y y v. The released code averages v without label and weight,
so its value is 1 - sigmoid(mean v), and dislikes have the gradient of likes; that is not reproduced.
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
    """Diffusion-KTO on single likes and dislikes, with likelihoods estimated by the ELBO.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2; twice the released
            code's.
        utility: utility h of a sample's value.
        kl: estimate of the reference point of values: "mean", "class_means" or "mismatched"
            (``methods.kto``).
        desirable_weight: weight w_y of desirable samples (lambda_d).
        undesirable_weight: weight w_y of undesirable samples (lambda_u).
        whole_batch: take the sigmoid of the batch's mean value instead of the mean of utilities.
        noising: map from clean latents to noisy states; each sample has its own noise.
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
        ll, offsets = likelihoods(self, policy, reference, batch, generator)
        return likes_step(self, ll.log_ratio, offsets, batch.score)


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
