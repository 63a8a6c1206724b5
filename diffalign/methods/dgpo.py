"""DGPO. Luo et al. 2025, "Reinforcing Diffusion Models by Direct Group Preference Optimization", arXiv
2510.08425 (and the released code).

Diffusion-DPO for a group of K samples of one prompt: samples with a positive advantage A are compared with
those with a negative one, at one time and with one noise. With m the policy's and r the reference's mean
squared error,

    w = sg sigmoid( sum over the group of beta A (m - r) / K ),    loss = mean( w A m ),

where A = clip(A, -a, a) is standardised over the rivals (``rollout.advantage: group_std``), so that the
group's A sum to 0 and terms that the ELBO omits cancel. No steps of an SDE are needed.

The reference is a fast moving average of the policy (``reference: trailing``, TDM-R1's), or the base. With
``clip`` a sample whose ratio exp(m_ema - m) has left 1 -+ clip in the direction of its advantage has no
gradient, as in PPO. ``kl`` weights the squared difference to the base.

Differences from the released code: each group has its own times (there a round has one draw); there the
moving average also samples in a later phase, here the policy always does.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.losses.surrogates import group_sums
from diffalign.methods._base import RolloutMethod
from diffalign.methods._multi_time import Stratified, detached_step, noised_rows
from diffalign.methods._steps import advantage_of, check_advantage_clip
from diffalign.methods._trailing import TRAILS, Trail, trailing_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class DGPO(RolloutMethod):
    """DGPO on groups of samples with advantages.

    Attributes:
        beta: factor of the argument of the group's weight, above 0.
        reference: network of the error r: the "trailing" moving average, or the "base".
        clip: half the width of the interval around 1 for the ratio exp(m_ema - m), in (0, 1); null: none.
        advantage_clip: a, largest absolute advantage, above 0.
        kl: weight of the squared difference to the base, at least 0.
        shared_noise: whether the samples of a group share their noise at a time.
        time: the S stratified times of a sample.
        trail: schedule of the moving average's decay.
    """

    beta: float = 100.0
    reference: Literal["trailing", "base"] = "trailing"
    clip: float | None = None
    advantage_clip: float = 5.0
    kl: float = 0.0
    shared_noise: bool = True
    time: Stratified = choice({"stratified": Stratified}, Stratified("discrete", 4, 0.7))
    trail: Trail = choice(TRAILS, Trail())

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_advantage_clip(self.advantage_clip)
        if not (self.beta > 0 and self.kl >= 0 and (self.clip is None or 0 < self.clip < 1)):
            raise UserError(
                f"method.beta={self.beta}, kl={self.kl}, clip={self.clip}; allowed: more than 0, 0 or more, "
                "more than 0 and less than 1 or null"
            )

    @property
    def trails(self) -> bool:
        """Whether the loss uses the moving average."""
        return self.reference == "trailing" or self.clip is not None

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all samples and times."""
        a = advantage_of(batch, CARD).clamp(-self.advantage_clip, self.advantage_clip)
        rows = noised_rows(self.time, policy, batch, generator, self.shared_noise)
        m, a = rows.by_time(rows.error(rows.prediction)), a.to(rows.prediction)
        ema = rows.predicted_by(trailing_of(reference, CARD)) if self.trails else m.detach()
        base = rows.predicted_by(reference) if self.reference == "base" or self.kl else m.detach()
        r = rows.by_time(rows.error(ema if self.reference == "trailing" else base))
        size = sent(batch.group.bincount()[batch.group], m)
        # w = sg sigmoid(sum over the group of beta A (m - r) / K)
        weight = group_sums(self.beta * a * (m.detach() - r) / size, batch.group).sigmoid()
        if self.clip is not None:
            # no gradient where exp(m_ema - m) has left 1 -+ clip in the direction of the advantage
            ratio = (rows.by_time(rows.error(ema)) - m.detach()).exp()
            m = torch.where(torch.where(a > 0, ratio > 1 + self.clip, ratio < 1 - self.clip), m.detach(), m)
        matching = (weight * a * m).mean()
        loss, metrics = matching, {"policy_loss": matching, "weight": weight.mean(), "errors": (m - r).mean()}
        if self.kl:
            metrics["kl"] = rows.distance(base).mean()
            loss = loss + self.kl * metrics["kl"]
        return detached_step({"loss": loss, **metrics}, batch)


CARD = MethodCard(
    name="dgpo",
    title="DGPO",
    paper="Luo et al., Reinforcing Diffusion Models by Direct Group Preference Optimization",
    year=2025,
    arxiv="2510.08425",
    data=DataKind.ROLLOUTS,
    cost="a time: 1 policy sample with gradient, 1 without (moving average), 1 more with kl",
    method=DGPO,
    advantages=True,
    whole=True,
    trailing="beside",
)
