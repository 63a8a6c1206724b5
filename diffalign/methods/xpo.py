"""XPO, exploratory preference optimisation. Xie et al. 2024, "Exploratory Preference Optimization: Harnessing
Implicit Q*-Approximation for Sample-Efficient RLHF", arXiv 2405.21046 (with TRL's code), on Diffusion-DPO's
likelihood.

Online DPO on pairs of one sample of the policy and one of the reference, with an exploration bonus for
leaving the reference's distribution. With m the policy's and r the reference's mean squared error,

    log p = -(scale / 2) m,    g = -(scale / 2) (m - r),
    loss  = l( beta (g_w - g_l) ) + alpha log p_theta(the reference's sample).

The bonus lowers the likelihood of the reference's samples, independently of the preference. It is not
bounded, so alpha is small (1e-5 in TRL). ``floor`` bounds it: the bonus has no gradient where g of the
reference's sample is below -floor.

``scale`` converts errors to log-probabilities, the unit of alpha and beta for language models; scale times
beta is the beta of ``dpo``. A tied pair has neither loss nor bonus.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast
from diffalign.methods._base import PairMethod, check_positive
from diffalign.methods._common import noisy, pair_losses, preference_metrics
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class XPO(PairMethod):
    """Online DPO with an exploration bonus, on pairs of a policy's and a reference's sample.

    Attributes:
        scale: scale of log-probabilities, above 0: log p = -scale m / 2.
        beta: DPO's beta, a factor of log-probability ratios, above 0.
        alpha: weight of the bonus, at least 0.
        floor: largest fall of the reference's samples' log-probability by the bonus, above 0; null: no bound.
    """

    scale: float = 50000.0
    beta: float = 0.1
    alpha: float = 1e-5
    floor: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, "scale", "beta")
        if not self.alpha >= 0 or not (self.floor is None or self.floor > 0):
            raise UserError(
                f"method.alpha={self.alpha}, floor={self.floor}; allowed: 0 or more, more than 0 or null"
            )

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over the pairs that are not tied.

        Raises:
            UserError: the batch does not mark the reference's samples.
        """
        if "of_reference" not in batch.extra:
            raise UserError(
                "method xpo is trained on samples of policy and reference, and this batch does not mark "
                "them (of_reference); allowed with it: a `rollout` section"
            )
        z = noisy(self, policy, reference, batch, generator)
        ll = elbo(policy, reference, z, batch.cond, self.reduce)
        # g = scale (log-ratio); the preference loss is l(beta (g_w - g_l))
        c, beta = contrast(ll.log_ratio, batch.score, batch.group), self.scale * self.beta
        losses = pair_losses(self.loss, beta * c.chosen, beta * c.rejected, c, batch)
        of_reference = batch.extra["of_reference"].to(losses)
        bonus = self._bonus(self.scale * ll.policy, self.scale * ll.log_ratio, of_reference)
        preference, exploration = c.mean(losses), c.mean(bonus[c.better] + bonus[c.worse])
        loss = preference + exploration
        metrics = {"loss": loss, "preference_loss": preference, "bonus": exploration}
        metrics = {name: value.detach() for name, value in metrics.items()}
        return Step(loss, {**metrics, **preference_metrics(c, beta)}, c.count)

    def _bonus(self, logp: Tensor, ratio: Tensor, of_reference: Tensor) -> Tensor:
        """Return alpha log p, (B,), for the reference's samples and 0 for the policy's."""
        if self.floor is not None:
            logp = torch.where(ratio.detach() < -self.floor, logp.detach(), logp)
        return self.alpha * of_reference * logp


CARD = MethodCard(
    name="xpo",
    title="XPO",
    paper="Xie et al., Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation",
    year=2024,
    arxiv="2405.21046",
    data=DataKind.ROLLOUTS,
    cost="2 policy samples with gradient, 2 reference samples; half of the samples are the reference's",
    method=XPO,
    by_reference=True,
)
