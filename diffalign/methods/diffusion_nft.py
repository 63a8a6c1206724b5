"""DiffusionNFT. Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
arXiv 2509.16117 (equations 5 to 7, and the released code).

It uses neither log-densities nor policy gradients. A sample with a reward share r in [0, 1] is fitted with
weight r by a positive policy v+, and with weight 1 - r by a negative policy v-, the reflection of v+ at the
old policy. With v_old the prediction of the policy that sampled and b a guidance strength,

    v+ = b v + (1 - b) v_old,    v- = (1 + b) v_old - b v,    x0+- = x_t - t v+-,
    L+- = mean( (x0+- - x0)^2 ) / w+-,    w+- = sg( mean |x0+- - x0| ), at least 1e-5,
    r = clip( A / (2 a) + 1/2, 0, 1 ),  A = clip(A, -a, a),
    loss = a mean( (r L+ + (1 - r) L-) / b ) + kl mean( (v - v_base)^2 ).

v_old is a moving average of the policy (``trail``), which also samples the rounds; set ``trail.every`` to the
optimizer steps of a round, so that it is updated between rounds. Each sample is trained on at all times of
the sampler except the last.

It works on any path: x0+- are the clean estimates of the mixed predictions. Differences from the released
code: the sampler of the ODE is of first order (there of second order).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.samplers import estimates_of
from diffalign.errors import UserError
from diffalign.methods._base import RolloutMethod
from diffalign.methods._multi_time import Stratified, detached_step, noised_rows
from diffalign.methods._steps import advantage_of, check_advantage_clip
from diffalign.methods._trailing import TRAILS, Trail, trailing_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Noised, Random, Step


@dataclass(frozen=True)
class DiffusionNFT(RolloutMethod):
    """DiffusionNFT on samples with advantages.

    Attributes:
        beta: guidance strength b, above 0.
        advantage_clip: a, largest absolute advantage, above 0.
        mode: transformation of advantages: "all", none; "positive_only" or "negative_only", others become 0
            (r = 1/2); "one_only", 1 for positive ones and 0 for others; "binary", their signs.
        kl: weight of the squared difference to the base, at least 0.
        time: the S stratified times of a sample.
        trail: schedule of the decay of v_old's moving average.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    kl: float = 1e-4
    time: Stratified = choice({"stratified": Stratified}, Stratified("discrete", None, 0.99))
    trail: Trail = choice(TRAILS, Trail(limit=0.5))

    needs_reference: ClassVar[bool] = True
    trails: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_advantage_clip(self.advantage_clip)
        if not (self.beta > 0 and self.kl >= 0):
            raise UserError(f"method.beta={self.beta}, kl={self.kl}; allowed: more than 0, 0 or more")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all samples and times."""
        share = self.share(advantage_of(batch, CARD))
        rows = noised_rows(self.time, policy, batch, generator, shared=False)
        old = rows.predicted_by(trailing_of(reference, CARD))
        # L+ and L-: errors of v+- = v_old +- b (v - v_old)
        plus, minus = (
            self._error(policy, rows.z, old + sign * self.beta * (rows.prediction - old)) for sign in (1, -1)
        )
        r = share.to(plus).repeat(rows.strata)
        fitted = self.advantage_clip * ((r * plus + (1 - r) * minus) / self.beta).mean()
        kl = rows.distance(rows.predicted_by(reference)).mean()
        loss = fitted + self.kl * kl
        metrics = {"loss": loss, "policy_loss": fitted, "kl": kl, "share": r.mean()}
        metrics |= {
            "errors/plus": plus.mean(),
            "errors/minus": minus.mean(),
            "ema_kl": rows.distance(old).mean(),
        }
        return detached_step(metrics, batch)

    def share(self, advantage: Tensor) -> Tensor:
        """Return the reward shares r (B,) of advantages (B,)."""
        a = advantage.clamp(-self.advantage_clip, self.advantage_clip)
        transformed = {
            "all": a,
            "positive_only": a.clamp(min=0),
            "negative_only": a.clamp(max=0),
            "one_only": (a > 0).to(a),
            "binary": a.sign(),
        }[self.mode]
        return (transformed / (2 * self.advantage_clip) + 0.5).clamp(0, 1)

    def _error(self, policy: Denoiser, z: Noised, prediction: Tensor) -> Tensor:
        """Return L of a prediction, (S B,)."""
        error = (estimates_of(policy, prediction, z.x_t, z.t)[0] - z.x0).flatten(1)
        return (error**2).mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


CARD = MethodCard(
    name="diffusion_nft",
    title="DiffusionNFT",
    paper="Zheng et al., DiffusionNFT: Online Diffusion Reinforcement with Forward Process",
    year=2025,
    arxiv="2509.16117",
    data=DataKind.ROLLOUTS,
    cost="a time: 1 policy sample with gradient, 2 without (base, moving average)",
    method=DiffusionNFT,
    advantages=True,
    trailing="sampler",
)
