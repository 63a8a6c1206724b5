"""DSPO. Zhu, Xiao and Honavar 2025, "DSPO: Direct Score Preference Optimization for Diffusion Model
Alignment", ICLR 2025 (OpenReview xyfb9HHvMe); the form released for SD 1.5 (huaishengzhu/DSPO).

The loss is on the winner only. With p the policy's prediction, y its target and k a weight that depends on
the pair,

    loss = mean |(p_w - y) - k (p_w - ref_w)|^2,    k = beta (1 - sigmoid(h)),
    h = -(scale / 2) [(m_w - r_w) - (m_l - r_l)].

The winner's prediction is fitted to its target plus a share k of the policy's difference to the reference.
The sigmoid is not detached, so the gradient has a part through the loser.

In the released code ``beta`` is both weight and scale (.001 in the launcher; .001, .01 or .05 in the readme),
so 1 - sigmoid(h) is 1/2 within 1e-5 and the loss is fine-tuning on winners with k = .0005. With a separate
``scale``, in Diffusion-DPO's units, the sigmoid depends on the pair; without one it is ``beta``, as released.
The loss is computed from three inner products, so that any ``reduce`` can be used.

The released code has another formula for SDXL, ``form: sdxl``:

    loss = mean( (1 - sigmoid(h))^2 |p_w - ref_w|^2 )  where the batch's mean |p_w - ref_w|^2 is at least
           ``apart`` (.1), else mean( (1 - sigmoid(h))^2 ).

While the policy is near the reference this is a bounded loss of the pair's logit, and the data affect it
through the logit only; the launcher's scale is 5000. "The batch" is the micro-batch of all processes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import residual
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.methods._base import StateMethod
from diffalign.methods._common import noisy, preference_step
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.distributed import mean_over_ranks


@dataclass(frozen=True, kw_only=True)
class DSPO(StateMethod):
    """Score matching on winners, with a target that depends on the preference.

    Attributes:
        beta: factor of the policy's difference to the reference in the target, above 0.
        scale: scale of the logit h, above 0; null: ``beta``, as released.
        form: "paper", the loss of the paper and of the code for SD 1.5, or "sdxl", that of the code for SDXL.
        apart: mean squared distance to the reference from which form "sdxl" includes it, above 0.
    """

    beta: float = 0.001
    scale: float | None = None
    form: Literal["paper", "sdxl"] = "paper"
    apart: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta", "scale", "apart"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"method.{name}={getattr(self, name)}; allowed: more than 0")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss on the winners of all pairs that are not tied."""
        z = noisy(self, policy, reference, batch, generator)
        with torch.no_grad():
            reference_residual = residual(reference, z, batch.cond)
        policy_residual = residual(policy, z, batch.cond)
        # p - ref; targets cancel. The loss is |p - y|^2 - 2 k (p - y)(p - ref) + k^2 |p - ref|^2.
        change = policy_residual - reference_residual
        error, cross, distance = (
            self.reduce(x) for x in (policy_residual**2, policy_residual * change, change**2)
        )
        c = contrast(-0.5 * (error - self.reduce(reference_residual**2)), batch.score, batch.group)
        scale = self.beta if self.scale is None else self.scale
        doubt = (-scale * c.margin).sigmoid()
        error, cross, distance = (x.gather(0, c.better) for x in (error, cross, distance))
        if self.form == "sdxl":
            far = mean_over_ranks(distance, c.weight) >= self.apart
            return preference_step(c, doubt**2 * torch.where(far, distance, 1.0), scale)
        k = self.beta * doubt
        return preference_step(c, error - 2 * k * cross + k**2 * distance, scale)


CARD = MethodCard(
    name="dspo",
    title="DSPO",
    paper="Zhu et al., DSPO: Direct Score Preference Optimization for Diffusion Model Alignment",
    year=2025,
    arxiv="openreview:xyfb9HHvMe",
    data=DataKind.PAIRS,
    cost="2 policy samples with gradient, 2 reference samples",
    method=DSPO,
)
