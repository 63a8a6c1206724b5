"""ADPO, anchored listwise form. Wang 2025, "ADPO: Anchored Direct Preference Optimization", arXiv 2510.18913;
the author's code (wk222/verlm).

For the K rivals of a group, with z_i the scores standardised within the group,

    q = softmax(z / beta_reward),   p = softmax(log_ratio / tau),   log_ratio = -(scale / 2) (m - r),
    loss = -sum_i q_i log p_i,      gradient (p - q) / tau.

The reference anchors the list: only log-ratios to it are matched to the scores. With two rivals and a one-hot
q it is DPO with beta = scale / tau. The author's language runs use tau .8, beta_reward .5 and lists of 8.

``temperature: adaptive`` computes a temperature for each list, without gradient: with H in [0, 1] the
normalised entropy of the policy's list and R in [0, 1] the list's mean score, rescaled by the smallest (0)
and the largest (1) of the batch,

    tau_list = clip( tau (1 + uncertainty H + penalty (1 - H) (1 - R)), low, high ):

so that lists with a high entropy, or with a low entropy and a low score, have a larger temperature. With
``by_reward: false``, or equal mean scores in the batch, R = 1/2. ``anchor_kl`` adds its weight times the mean
over the samples of exp(-d) - 1 + d with d = scale log_ratio, an estimate of the KL to the reference.

Scores are divided by the unbiased standard deviation, as in the code. Ours: the transfer to denoising errors;
a group of equal scores has weight 0 (there the target is the uniform list); H is the entropy of the list p
over log K (for language models that of the tokens over log 32000). "The batch" is this process's micro-batch.
The Plackett-Luce loss of later versions is ``diffusion_lpo``.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True, kw_only=True)
class ADPO(StateMethod):
    """Cross-entropy of the policy's list distribution to a softmax of the scores.

    Attributes:
        scale: scale of log-ratios, above 0: a log-ratio is scale (r - m) / 2.
        tau: temperature of the policy's list, above 0.
        beta_reward: temperature of the standardised scores, above 0.
        temperature: "fixed", or "adaptive" to entropy and reward, see the module.
        uncertainty: weight of the entropy in the adaptive temperature, at least 0.
        penalty: weight of low entropy with a low reward in the adaptive temperature, at least 0.
        low: smallest adaptive temperature, above 0.
        high: largest adaptive temperature.
        by_reward: whether the adaptive temperature depends on the scores.
        anchor_kl: weight of the estimate of the KL to the reference, at least 0.
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
        # log p = log softmax(log_ratio / tau), q = softmax(z / beta_reward)
        log_p = among(reward / tau[sent(batch.group, tau.device)]).masked_fill(~member, 0.0)
        losses = -(among(standard / self.beta_reward).exp() * log_p).sum(1)
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        metrics = preference_metrics(contrast(ratio, batch.score, batch.group), self.scale)
        if self.anchor_kl:
            counted = weight[sent(batch.group, weight.device)]
            metrics["anchor_kl"] = (kl_estimate(reward) * counted).sum() / counted.sum().clamp(min=1)
            loss = loss + self.anchor_kl * metrics["anchor_kl"]
        if self.temperature == "adaptive":
            metrics["tau"] = (tau * weight).sum() / weight.sum().clamp(min=1)
        metrics = {name: value.detach() for name, value in metrics.items()}
        return Step(loss, {"loss": loss.detach(), **metrics}, weight.sum())

    def temperatures(self, reward: Tensor, score: Tensor, group: Tensor) -> Tensor:
        """Return the temperature (G, *unit) of each list from detached rewards (B, *unit) and scores."""
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
    """Return the mask (G, B, *1) of the samples of each group, on the device of ``like`` (B, *unit)."""
    rows = group[None, :] == torch.arange(int(group.max()) + 1)[:, None]
    return expand(sent(rows, like.device), like[None])


def standardised(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores standardised within groups, (B, *unit), and 1 for groups that are not tied, (G, *unit).

    Standardised scores are (score - mean) / unbiased standard deviation; groups of equal scores have 0.
    """
    member, index = _members(group, score).to(score), sent(group, score.device)
    count = member.sum(1)
    centred = score - (((member * score).sum(1)) / count)[index]
    std = ((member * centred**2).sum(1) / (count - 1).clamp(min=1)).sqrt()
    spread = (std > 1e-8).to(score)
    return centred / torch.where(spread > 0, std, 1.0)[index], spread


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
