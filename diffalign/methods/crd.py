"""CRD, centered reward distillation. arXiv 2603.14128 (2026; after Flow-Factory's port, the authors' code
was not at hand).

The KL-regularised optimum makes the reward of a sample an implicit reward of the policy up to a constant of
its prompt, which drops out where both are centred within the prompt. By the forward process, without
log-densities: with e the squared error of a prediction at a time t, v_old that of a moving average of the
policy, and

    w = sg( mean |v - target| ), at least 1e-5,    r = -mean( e_theta / w_theta - e_old / w_old ),
    R = clip(A, -a, a) / (2 a) + 1/2,

over the samples of a prompt (at one time, with their own noise) with weights q that sum to 1,

    R_c = R - sum q R,    r_c = r - sg( sum q r ),
    loss = (a / beta) mean( (beta r_c - R_c)^2 ),  or the binary cross-entropy of beta r_c to sigmoid(R_c),
           + kl mean( (f + (1 - f) R) mean (v - v_ref)^2 ),    f = kl_floor / kl.

q is uniform, or with a temperature T (``weight_temp``) the mean of two losses, whose q are softmax(R / T)
and softmax(-R / T). v_ref is the base under guidance ``kl_guidance``, to which good samples are held more
tightly.

v_old is the first moving average (``trail``); a second one (``sampler_trail``) samples the rounds, so that
they move slowly. Set ``sampler_trail.every`` to the optimizer steps of a round.

What differs from the port: it centres over the micro-batch of whatever prompts (``centre: batch``), where the
prompts' constants do not cancel, here a prompt's samples are centred, at one time of theirs; its hard weights
(temperature 0) come out uniform there, and are not here.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from diffalign.config.build import choice
from diffalign.errors import UserError
from diffalign.losses.surrogates import group_softmax, group_sums
from diffalign.methods._base import RolloutMethod
from diffalign.methods._multi_time import NoisedRows, Stratified, detached_step, noised_rows
from diffalign.methods._steps import advantage_of, check_advantage_clip
from diffalign.methods._trailing import TRAILS, Trail, trailing_of
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True)
class CRD(RolloutMethod):
    """Samples with advantages, whose implicit rewards are fitted to centred rewards.

    Attributes:
        beta: what makes rewards of implicit ones.
        advantage_clip: a.
        loss_type: squared difference, or binary cross-entropy.
        weight_temp: T; null: uniform weights.
        centre: within each prompt, or over all samples of the micro-batch.
        kl: weight of the squared difference to the base.
        kl_floor: weight of it that the worst samples have.
        kl_guidance: scale of classifier-free guidance of the base there; 1: none.
        time: the times that a sample is trained on.
        trail: how v_old follows.
        sampler_trail: how the policy that samples the rounds follows.
    """

    beta: float = 1.0
    advantage_clip: float = 5.0
    loss_type: Literal["mse", "bce"] = "mse"
    weight_temp: float | None = None
    centre: Literal["prompt", "batch"] = "prompt"
    kl: float = 0.1
    kl_floor: float = 1e-4
    kl_guidance: float = 4.5
    time: Stratified = choice({"stratified": Stratified}, Stratified("discrete", None, 0.99))
    trail: Trail = choice(TRAILS, Trail(limit=0.999, rate=0.005, first=0.25))
    sampler_trail: Trail = choice(TRAILS, Trail(limit=0.999, rate=0.0075, start=75))

    needs_reference: ClassVar[bool] = True
    trails: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_advantage_clip(self.advantage_clip)
        if not (self.beta > 0 and (self.weight_temp is None or self.weight_temp > 0)):
            raise UserError(
                f"method.beta={self.beta}, weight_temp={self.weight_temp}; allowed: more than 0, more than 0 "
                "or null"
            )
        if not (self.kl >= 0 and self.kl_floor >= 0 and self.kl_guidance >= 0):
            raise UserError(
                f"method.kl={self.kl}, kl_floor={self.kl_floor}, kl_guidance={self.kl_guidance}; allowed: 0 "
                "or more each"
            )
        if self.kl and self.kl_floor > self.kl:
            raise UserError(f"method.kl_floor={self.kl_floor}; allowed: at most method.kl={self.kl}")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over all samples and times."""
        clipped = advantage_of(batch, CARD).clamp(-self.advantage_clip, self.advantage_clip)
        rows = noised_rows(self.time, policy, batch, generator, shared=False)
        reward = (clipped / (2 * self.advantage_clip) + 0.5).to(rows.prediction)
        old = rows.predicted_by(trailing_of(reference, CARD))
        implicit = rows.by_time(scaled_error(rows, old) - scaled_error(rows, rows.prediction))
        fitted = (self.advantage_clip / self.beta) * self._fit(implicit, reward, batch.group)
        metrics = {"policy_loss": fitted, "reward": reward.mean(), "implicit": implicit.mean()}
        metrics["ema_kl"] = rows.distance(old).mean()
        loss = fitted
        if self.kl:
            base = rows.predicted_by(reference, self.kl_guidance)
            floor = self.kl_floor / self.kl
            metrics["kl"] = ((floor + (1 - floor) * reward) * rows.by_time(rows.distance(base))).mean()
            loss = loss + self.kl * metrics["kl"]
        return detached_step({"loss": loss, **metrics}, batch)

    def _fit(self, implicit: Tensor, reward: Tensor, group: Tensor) -> Tensor:
        """Mean loss of implicit rewards (S, B), with gradient, against rewards (B,)."""
        group = group if self.centre == "prompt" else torch.zeros_like(group)
        reward = reward.expand_as(implicit)
        pools = [torch.zeros_like(reward)]
        if self.weight_temp is not None:
            pools = [reward / self.weight_temp, -reward / self.weight_temp]
        losses = []
        for pool in pools:
            q = group_softmax(pool, group)
            target = reward - group_sums(q * reward, group)
            logit = self.beta * (implicit - group_sums(q * implicit, group).detach())
            if self.loss_type == "mse":
                losses.append(((logit - target) ** 2).mean())
            else:
                losses.append(binary_cross_entropy_with_logits(logit, target.sigmoid()))
        return torch.stack(losses).mean()


def scaled_error(rows: NoisedRows, prediction: Tensor) -> Tensor:
    """Return the mean squared error (S B,) over the mean absolute one, which has no gradient."""
    off = (prediction - rows.target).flatten(1)
    return (off**2).mean(1) / off.detach().abs().mean(1).clamp(min=1e-5)


CARD = MethodCard(
    name="crd",
    title="CRD",
    paper="Centered Reward Distillation",
    year=2026,
    arxiv="2603.14128",
    data=DataKind.ROLLOUTS,
    cost="a time: 1 policy sample with gradient, 3 without (moving average, guided base)",
    method=CRD,
    advantages=True,
    whole=True,
    trailing="both",
)
