"""MaPO. Hong et al. 2024, "Margin-aware Preference Optimization for Aligning Diffusion Models without
Reference", arXiv 2406.06424.

There is no reference. With m the policy's mean squared denoising errors of a pair at one time and noise,

    loss = m_w - beta log sigmoid( T (phi(m_w) - phi(m_l)) ),    phi(x) = snr x / (exp(snr x) - 1),

with beta 0.1, snr 0.5 and T 1000 as released (``form: released``). The text of the AAAI version has another
loss, ``form: paper``; ``form: orpo`` is ORPO with denoising errors and a corrected sign
(``losses.reference_free``). The forms' beta weights the preference term against fine-tuning; it is no weight
of a KL.

Differences from the released code: phi and its gradient are exact down to an error of 0, and errors are
float32 under half precision.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import denoising_error
from diffalign.losses.contrast import contrast
from diffalign.losses.reference_free import FORMS, ErrorLoss, Released
from diffalign.methods._base import StateMethod
from diffalign.methods._common import noisy
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class MaPO(StateMethod):
    """MaPO on pairs of rivals, without a reference.

    Attributes:
        form: loss of the two denoising errors of a pair.
    """

    form: ErrorLoss = choice(FORMS, Released())

    needs_reference: ClassVar[bool] = False

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all pairs of rivals that are not tied; ``reference`` is not called."""
        z = noisy(self, policy, reference, batch, generator)
        errors = denoising_error(policy, z, batch.cond, self.reduce)
        c = contrast(-errors, batch.score, batch.group)
        loss = c.mean(self.form(-c.chosen, -c.rejected))
        logit = self.form.logit(-c.chosen, -c.rejected).detach()
        correct = (logit > 0).to(logit) + 0.5 * (logit == 0).to(logit)
        metrics = {
            "loss": loss.detach(),
            "rewards/margins": c.mean(logit),
            "rewards/accuracies": c.mean(correct),
            "denoising/chosen": -c.mean(c.chosen.detach()),
            "denoising/rejected": -c.mean(c.rejected.detach()),
        }
        return Step(loss, metrics, c.count)


CARD = MethodCard(
    name="mapo",
    title="MaPO",
    paper="Hong et al., Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
    year=2024,
    arxiv="2406.06424",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient",
    method=MaPO,
)
