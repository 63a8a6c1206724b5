"""ADPO, anchored listwise form. Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913;
the author's code (wk222/verlm).

For the K rivals of a group, with scores standardised within the group to z_i,

    q = softmax(z / beta_reward),   p = softmax(log_ratio / tau),   log_ratio = -(scale / 2) (m - r),
    loss = -sum_i q_i log p_i,      gradient (p - q) / tau.

The reference anchors the list: only differences from it are matched to the scores. Two rivals and a one-hot q
are DPO with beta = scale / tau. The author's language runs use tau .8, beta_reward .5 and lists of 8.

Standardising divides by the unbiased standard deviation, as the code does. Ours: the transposition to
denoising errors, and a group of equal scores has weight 0 (the code pulls it to the uniform list). Not here:
the temperature that adapts to entropy and the Plackett-Luce variants of later versions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import expand
from diffalign.losses.contrast import contrast
from diffalign.methods._base import StateMethod, check_positive
from diffalign.methods._common import noisy, preference_metrics
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class ADPO(StateMethod):
    """Lists against a softmax of their scores.

    Attributes:
        scale: makes log-ratios, in units of a mean squared error with Diffusion-DPO's 1/2.
        tau: temperature of the policy's list.
        beta_reward: temperature of the standardised scores.
    """

    scale: float = 2000.0
    tau: float = 0.8
    beta_reward: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self, "scale", "tau", "beta_reward")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean cross-entropy over all groups whose scores differ."""
        z = noisy(self, policy, reference, batch, generator)
        ratio = elbo(policy, reference, z, batch.cond, self.reduce).log_ratio
        standard, weight = standardised(batch.score.to(ratio), batch.group)
        member = _members(batch.group, ratio)

        def among(x: Tensor) -> Tensor:
            return torch.where(member, x, -torch.inf).log_softmax(1)

        log_p = among(self.scale / self.tau * ratio).masked_fill(~member, 0.0)
        losses = -(among(standard / self.beta_reward).exp() * log_p).sum(1)
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        metrics = preference_metrics(contrast(ratio, batch.score, batch.group), self.scale)
        return Step(loss, {"loss": loss.detach(), **metrics}, weight.sum())


def _members(group: Tensor, like: Tensor) -> Tensor:
    """Return (G, B, *1): whether a sample belongs to a group, on the device of ``like`` (B, *unit)."""
    rows = group[None, :] == torch.arange(int(group.max()) + 1)[:, None]
    return expand(rows.to(like.device), like[None])


def standardised(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, *unit) minus their group's mean over its unbiased standard deviation, and (G, *unit) 1
    where a group has any spread, else 0.
    """
    member, index = _members(group, score).to(score), group.to(score.device)
    count = member.sum(1)
    apart = score - (((member * score).sum(1)) / count)[index]
    std = ((member * apart**2).sum(1) / (count - 1).clamp(min=1)).sqrt()
    spread = (std > 1e-8).to(score)
    return apart / torch.where(spread > 0, std, 1.0)[index], spread


CARD = MethodCard(
    name="adpo",
    title="ADPO",
    paper="Wang, ADPO: Anchored Direct Preference Optimization",
    year=2025,
    arxiv="2510.18913",
    data=DataKind.LISTS,
    cost="K policy samples with gradient, K reference samples",
    method=ADPO,
)
