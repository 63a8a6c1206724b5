"""ADPO, anchored listwise form. Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913;
the author's code (wk222/verlm).

For the K rivals of a group, with scores standardised within the group to z_i,

    q = softmax(z / beta_reward),   p = softmax(log_ratio / tau),   log_ratio = -(scale / 2) (m - r),
    loss = -sum_i q_i log p_i,      gradient (p - q) / tau.

The reference anchors the list: only differences from it are matched to the scores. Two rivals and a one-hot q
are DPO with beta = scale / tau. The author's language runs use tau .8, beta_reward .5 and lists of 8.

``temperature: adaptive`` gives each list a temperature of its own, held constant in the gradient: with H in
[0, 1] the policy's uncertainty and R in [0, 1] how well the list's prompt fares, its mean score between the
least (0) and the greatest (1) of the batch's prompts,

    tau_list = clip( tau (1 + uncertainty H + penalty (1 - H) (1 - R)), low, high ):

where the policy is unsure, or sure of what scores badly, it is held less tightly. ``by_reward: false``, and a
batch of equal mean scores, have R = 1/2. ``anchor_kl`` adds its weight times the mean over the samples of
exp(-d) - 1 + d with d = scale log_ratio, an estimate of the KL to the reference.

Standardising divides by the unbiased standard deviation, as the code does. Ours: the transposition to
denoising errors; a group of equal scores has weight 0 (the code pulls it to the uniform list); H is the
entropy of the list p over log K, where language models have that of their tokens over log 32000. "The batch"
is this process's micro-batch. The Plackett-Luce loss of later versions is ``diffusion_lpo``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import expand
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.losses.listwise import adaptive_temperature
from diffalign.losses.policy_gradient import kl_estimate
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
        temperature: "fixed", or "adaptive" to uncertainty and reward, see the module.
        uncertainty: how much an unsure list raises it.
        penalty: how much a sure list that scores badly raises it.
        low: smallest adaptive temperature.
        high: largest one.
        by_reward: whether it looks at the scores.
        anchor_kl: weight of the estimate of the KL to the reference.
    """

    scale: float = 2000.0
    tau: float = 0.8
    beta_reward: float = 0.5
    temperature: Literal["fixed", "adaptive"] = "fixed"
    uncertainty: float = 0.5
    penalty: float = 0.5
    low: float = 0.05
    high: float = 5.0
    by_reward: bool = True
    anchor_kl: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "scale", "tau", "beta_reward")
        if not 0 < self.low <= self.high:
            raise UserError(f"method.low={self.low}, high={self.high}; allowed: 0 < low <= high")
        for name in ("uncertainty", "penalty", "anchor_kl"):
            if not getattr(self, name) >= 0:
                raise UserError(f"method.{name}={getattr(self, name)}; allowed: 0 or more")

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

        reward = self.scale * ratio
        tau = torch.full_like(weight, self.tau)
        if self.temperature == "adaptive":
            tau = self.temperatures(reward.detach(), batch.score.to(ratio), batch.group)
        log_p = among(reward / tau[batch.group.to(tau.device)]).masked_fill(~member, 0.0)
        losses = -(among(standard / self.beta_reward).exp() * log_p).sum(1)
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        metrics = preference_metrics(contrast(ratio, batch.score, batch.group), self.scale)
        if self.anchor_kl:
            told = weight[batch.group.to(weight.device)]
            metrics["anchor_kl"] = (kl_estimate(reward) * told).sum() / told.sum().clamp(min=1)
            loss = loss + self.anchor_kl * metrics["anchor_kl"]
        if self.temperature == "adaptive":
            metrics["tau"] = (tau * weight).sum() / weight.sum().clamp(min=1)
        metrics = {name: value.detach() for name, value in metrics.items()}
        return Step(loss, {"loss": loss.detach(), **metrics}, weight.sum())

    def temperatures(self, reward: Tensor, score: Tensor, group: Tensor) -> Tensor:
        """Return tau (G, *unit) of each list from rewards (B, *unit), without gradient, and scores."""
        member = _members(group, reward)
        log_p = torch.where(member, reward / self.tau, -torch.inf).log_softmax(1).masked_fill(~member, 0.0)
        p = torch.where(member, log_p.exp(), 0.0)
        rivals = member.to(reward).sum(1).clamp(min=2)
        entropy = -(p * log_p).sum(1) / rivals.log()
        mean = torch.where(member, score, 0.0).sum(1) / member.to(score).sum(1)
        return adaptive_temperature(
            self.tau,
            entropy.clamp(0, 1),
            mean if self.by_reward else torch.zeros_like(mean),
            uncertainty=self.uncertainty,
            penalty=self.penalty,
            bounds=(self.low, self.high),
        )


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
