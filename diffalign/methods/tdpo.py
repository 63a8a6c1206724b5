"""TDPO. Xian et al. 2025, "Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image
Pairs" (Text Preference Optimization), arXiv 2509.25771: Diffusion-DPO between prompts for one image.

A group is one image with its own caption (score 1) and perturbed ones (score 0), all with the same x_t and
noise; with m(c) the policy's and r(c) the reference's mean squared denoising error under caption c,

    loss = -log sigmoid( -(beta / 2) [(m(c_w) - r(c_w)) - (m(c_l) - r(c_l))] ).

No images are generated; ``diffalign.data`` perturbs the captions. beta is that of Diffusion-DPO, with its
1/2.

No code has been published; the loss is the dual-caption form that DCPO-T2I released. The paper clips the
negative term without a formula; ``clip`` has two forms, both ours (``losses.clipping``). Without a clip the
error on wrong captions can grow without bound, which harms guidance: watch ``errors/rejected``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import elbo
from diffalign.losses.clipping import CLIPS, Clip, Unlimited
from diffalign.losses.contrast import contrast
from diffalign.methods._base import PairMethod
from diffalign.methods._common import noisy, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Likelihood, Random, Step


@dataclass(frozen=True, kw_only=True)
class TDPO(PairMethod):
    """Diffusion-DPO between right and wrong captions of one image.

    Attributes:
        beta: weight of the KL to the reference, above 0: rewards are beta (r - m) / 2.
        clip: limit on the log-ratios of wrong captions (ours).
        noising: map from clean latents to noisy states; captions of one image share the noise.
    """

    beta: float = 5000.0
    clip: Clip = choice(CLIPS, Unlimited())

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of captions that are not tied."""
        z = noisy(self, policy, reference, batch, generator)
        ll = elbo(policy, reference, z, batch.cond, self.reduce)
        c = contrast(limited(self.clip, ll, batch.score), batch.score, batch.group)
        return preference_step(c, self.loss(self.beta * c.chosen, self.beta * c.rejected), self.beta)


def limited(clip: Clip, ll: Likelihood, score: Tensor) -> Tensor:
    """Return log-ratios (B, *unit), with ``clip`` applied to those of wrong captions (score below 1/2)."""
    return torch.where(score < 0.5, clip(ll.policy, ll.reference), ll.log_ratio)


CARD = MethodCard(
    name="tdpo",
    title="TDPO",
    paper="Xian et al., Free Lunch Alignment of Text-to-Image Diffusion Models without Preference Image "
    "Pairs",
    year=2025,
    arxiv="2509.25771",
    data=DataKind.CAPTIONS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=TDPO,
)
