"""Advantage weighted matching. Xue et al. 2025, "Advantage Weighted Matching: Aligning RL with Pretraining in
Diffusion Models", arXiv 2509.25050 (with the released code).

Policy gradient with the pre-training objective in place of a log-density. Finished samples are noised at S
stratified times each. With m the policy's mean squared error, l(m, t) minus a weighted error
(``losses.surrogates``) and A the sample's advantage,

    A = clip(A, -a, a) / a,    rho = exp(l - l_old),
    loss = max( -A rho, -A clip(rho, 1 - c, 1 + c) ) + kl w |v - v_base|^2 + ema_kl w |v - v_ema|^2,

averaged over samples and times, where |.|^2 is a mean over the latent elements and v_ema the prediction of a
fast moving average of the policy. ``order: sum_first`` averages l over the times before the exponential. As
released there is one optimizer step a round, so l_old is l without gradient, rho = 1, and the gradient is
that of -A l; ``old: trailing`` takes l_old of the moving average. w is 1, or the weight of Flow-GRPO's SDE
("elbo"). The division of A by a corresponds to a learning rate that is a times smaller.

On any path v is the network's own prediction target. Group statistics are Flow-GRPO's
(``rollout.advantage: group_batch``).

Differences from the released code: errors of float32 predictions are float32, not float64; each group has
its own times and noise (``methods._multi_time``).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.losses.policy_gradient import ppo
from diffalign.losses.surrogates import Weighting, elbo_weight, surrogate_log_density
from diffalign.methods._base import RolloutMethod
from diffalign.methods._multi_time import Stratified, detached_step, noised_rows
from diffalign.methods._steps import advantage_of, check_advantage_clip
from diffalign.methods._trailing import TRAILS, Trail, trailing_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True)
class AWM(RolloutMethod):
    """AWM on samples with advantages, with likelihoods estimated by the denoising error.

    Attributes:
        weighting: weighting of the error in l, see ``losses.surrogates.surrogate_log_density``.
        power: exponent p of "ghuber", above 0.
        order: ratios of each time ("exp_first") or of the mean over times ("sum_first").
        clip: c, half the width of the interval around 1 to which the ratio is clipped, in (0, 1].
        advantage_clip: a, largest absolute advantage, above 0; advantages are clamped to it and divided by
            it.
        kl: weight of the squared difference to the base, at least 0.
        kl_weight: its weight w over time: "uniform" or "elbo".
        ema_kl: weight of the squared difference to the moving average, at least 0.
        ema_kl_weight: its weight w over time: "uniform" or "elbo".
        old: network of l_old: the "current" policy, without gradient, or the "trailing" moving average.
        time: the S stratified times of a sample.
        trail: schedule of the moving average's decay.
    """

    weighting: Weighting = "ghuber"
    power: float = 0.25
    order: Literal["exp_first", "sum_first"] = "exp_first"
    clip: float = 1.0
    advantage_clip: float = 5.0
    kl: float = 1e-3
    kl_weight: Literal["uniform", "elbo"] = "uniform"
    ema_kl: float = 1.0
    ema_kl_weight: Literal["uniform", "elbo"] = "uniform"
    old: Literal["current", "trailing"] = "current"
    time: Stratified = choice({"stratified": Stratified}, Stratified())
    trail: Trail = choice(TRAILS, Trail())

    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_advantage_clip(self.advantage_clip)
        if not (0 < self.clip <= 1 and self.power > 0 and self.kl >= 0 and self.ema_kl >= 0):
            raise UserError(
                f"method.clip={self.clip}, power={self.power}, kl={self.kl}, ema_kl={self.ema_kl}; allowed: "
                "more than 0 up to 1, more than 0, 0 or more, 0 or more"
            )

    @property
    def trails(self) -> bool:
        """Whether the loss uses the moving average."""
        return self.ema_kl > 0 or self.old == "trailing"

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all samples and times.

        Raises:
            UserError: the batch has no advantages.
        """
        advantage = advantage_of(batch, CARD).clamp(-self.advantage_clip, self.advantage_clip)
        rows = noised_rows(self.time, policy, batch, generator, shared=False)
        ema = rows.predicted_by(trailing_of(reference, CARD)) if self.trails else rows.prediction.detach()
        # l and l_old (S B,); rho = exp(l - l_old) of each time or of the mean over times
        logp = surrogate_log_density(rows.error(rows.prediction), rows.z.t, self.weighting, self.power)
        old = logp.detach()
        if self.old == "trailing":
            old = surrogate_log_density(rows.error(ema), rows.z.t, self.weighting, self.power)
        gain = rows.by_time(logp - old)
        gain = gain if self.order == "exp_first" else gain.mean(0, keepdim=True)
        scaled = (advantage / self.advantage_clip).to(gain).expand_as(gain)
        losses, ratio = ppo(gain, scaled, self.clip)
        elbo = elbo_weight(rows.z.t)
        base = rows.predicted_by(reference) if self.kl else rows.prediction.detach()
        kl = (rows.distance(base) * (elbo if self.kl_weight == "elbo" else 1)).mean()
        ema_kl = (rows.distance(ema) * (elbo if self.ema_kl_weight == "elbo" else 1)).mean()
        loss = losses.mean() + self.kl * kl + self.ema_kl * ema_kl
        clipped = ((ratio - 1).abs() > self.clip).to(ratio).mean()
        metrics = {"loss": loss, "policy_loss": losses.mean(), "kl": kl, "ema_kl": ema_kl}
        metrics |= {"ratio": ratio.mean(), "clip_fraction": clipped, "advantage": scaled.mean()}
        return detached_step(metrics, batch)


CARD = MethodCard(
    name="awm",
    title="AWM",
    paper="Xue et al., Advantage Weighted Matching: Aligning RL with Pretraining in Diffusion Models",
    year=2025,
    arxiv="2509.25050",
    data=DataKind.ROLLOUTS,
    cost="a time: 1 policy sample with gradient, 2 without (base, moving average)",
    method=AWM,
    advantages=True,
    trailing="beside",
)
