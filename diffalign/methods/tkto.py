"""TKTO. Xian et al. 2025, "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image
Pairs" (Text Preference Optimization), arXiv 2509.25771: Diffusion-KTO between prompts.

An image with its own caption is a like (score 1), the same image with a perturbed caption a dislike (score
0); a group holds the captions of one image, which share x_t and noise. Value, utility and beta are those of
``methods.kto`` (so that code's ``beta_dpo`` B is ``beta: 2 B`` here), the negative term can be clipped as in
``methods.tdpo``.

No code has been published and the paper's beta, learning rate and clipping are not known: the defaults are
ours. The reference point ``kl`` is computed from the clipped log-ratios.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.losses.clipping import CLIPS, Clip, Unlimited
from diffalign.losses.pointwise import UTILITIES, Sigmoid, Utility
from diffalign.methods._base import ScaledMethod
from diffalign.methods._likes import KL, likelihoods, likes_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.methods.tdpo import limited
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class TKTO(ScaledMethod):
    """Diffusion-KTO with right captions as likes and wrong ones as dislikes.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        clip: limit on the log-ratios of wrong captions (ours).
        utility: utility h of a sample's value.
        kl: estimate of the reference point of values: "mean", "class_means" or "mismatched"
            (``methods.kto``).
        desirable_weight: weight w_y of right captions.
        undesirable_weight: weight w_y of wrong captions.
        whole_batch: take the sigmoid of the batch's mean value instead of the mean of utilities.
        noising: map from clean latents to noisy states; captions of one image share the noise.
    """

    beta: float = 2000.0
    clip: Clip = choice(CLIPS, Unlimited())
    utility: Utility = choice(UTILITIES, Sigmoid())
    kl: KL = "mean"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    whole_batch: bool = False

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all captions."""
        ll, offsets = likelihoods(self, policy, reference, batch, generator)
        ratios = limited(self.clip, ll, batch.score)
        return likes_step(self, ratios, offsets if self.kl == "mismatched" else ratios, batch.score)


CARD = MethodCard(
    name="tkto",
    title="TKTO",
    paper="Xian et al., Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image "
    "Pairs",
    year=2025,
    arxiv="2509.25771",
    data=DataKind.CAPTIONS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=TKTO,
)
