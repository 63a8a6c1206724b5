"""DSPO. Zhu, Xiao and Honavar 2025, "DSPO: Direct Score Preference Optimization for Diffusion Model
Alignment", ICLR 2025 (OpenReview xyfb9HHvMe); the form released for SD 1.5 (huaishengzhu/DSPO).

On the winner alone, with p the policy's prediction, y its target and k a weight that the pair decides,

    loss = mean |(p_w - y) - k (p_w - ref_w)|^2,    k = beta (1 - sigmoid(h)),
    h = -(scale / 2) [(m_w - r_w) - (m_l - r_l)].

The winner's score is fitted to the data's plus a share of how far the policy has already moved. The sigmoid
is not detached: through it the loser enters the gradient.

Released: one ``beta`` is both weight and scale (.001 in the launcher; .001, .01 or .05 in the readme), so 1 -
sigmoid(h) is 1/2 within 1e-5 and the loss is that of fine-tuning on winners with k = .0005. A ``scale`` of
its own, in Diffusion-DPO's units, makes the sigmoid see the pair; without one it is ``beta``, as released.
Computed from three inner products, so that any ``reduce`` works.

The released code has another formula for SDXL, ``form: sdxl``:

    loss = mean( (1 - sigmoid(h))^2 |p_w - ref_w|^2 )  where the batch's mean |p_w - ref_w|^2 is at least
           ``apart`` (.1), else mean( (1 - sigmoid(h))^2 ).

As long as the policy is near the reference it is a bounded loss of the pair's logit, and the data enter
through the logit alone; the launcher's scale is 5000. "The batch" is the micro-batch of all processes.
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
    """Score matching on winners, turned by the preference.

    Attributes:
        beta: weight of the policy's own way from the reference, below 1.
        scale: of the logit, in units of a mean squared error with Diffusion-DPO's 1/2; None takes ``beta``.
        form: the paper's loss, which is the one released for SD 1.5, or the one released for SDXL.
        apart: of form "sdxl": mean squared way from the reference from which it enters the loss.
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
        """Return the mean loss on the winners of all pairs that are no tie."""
        z = noisy(self, policy, reference, batch, generator)
        with torch.no_grad():
            held = residual(reference, z, batch.cond)
        off = residual(policy, z, batch.cond)
        error, along, moved = (self.reduce(x) for x in (off**2, off * (off - held), (off - held) ** 2))
        c = contrast(-0.5 * (error - self.reduce(held**2)), batch.score, batch.group)
        scale = self.beta if self.scale is None else self.scale
        doubt = (-scale * c.margin).sigmoid()
        error, along, moved = (x.gather(0, c.better) for x in (error, along, moved))
        if self.form == "sdxl":
            far = mean_over_ranks(moved, c.weight) >= self.apart
            return preference_step(c, doubt**2 * torch.where(far, moved, 1.0), scale)
        k = self.beta * doubt
        return preference_step(c, error - 2 * k * along + k**2 * moved, scale)


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
