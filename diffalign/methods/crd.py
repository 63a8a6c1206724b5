"""CRD. Zhu et al. 2026, "Diffusion Reinforcement Learning via Centered Reward Distillation", arXiv 2603.14128
(after Flow-Factory's port; the authors' code was not available).

At the KL-regularised optimum the reward of a sample equals an implicit reward of the policy up to a constant
of its prompt, which cancels if both are centred within the prompt. The implicit reward is estimated by the
forward process, without log-densities. With e the squared error of a prediction at a time t, v_old that of a
moving average of the policy, and

    w = sg( mean |v - target| ), at least 1e-5,    r = -mean( e_theta / w_theta - e_old / w_old ),
    R = clip(A, -a, a) / (2 a) + 1/2,

and, over the samples of a prompt (at one time, each with its own noise), weights q that sum to 1,

    R_c = R - sum q R,    r_c = r - sg( sum q r ),
    loss = (a / beta) mean( (beta r_c - R_c)^2 ),  or the binary cross-entropy of beta r_c to sigmoid(R_c),
           + kl mean( (f + (1 - f) R) mean (v - v_ref)^2 ),    f = kl_floor / kl.

q is uniform; with a temperature T (``weight_temp``) the loss is the mean of two, with q = softmax(R / T) and
q = softmax(-R / T). v_ref is the prediction of the base with guidance ``kl_guidance``; its weight grows with
R.

v_old is the prediction of the first moving average (``trail``); a second one (``sampler_trail``), which
changes more slowly, samples the rounds. Set ``sampler_trail.every`` to the optimizer steps of a round.

Differences from the port: there rewards are centred over a micro-batch of any prompts (``centre: batch``),
where the prompts' constants do not cancel; here over the samples of a prompt, at one time. Its hard weights
(temperature 0) are uniform in effect and are not supported here.
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
    """Regression of implicit rewards onto centred rewards, for samples with advantages.

    Attributes:
        beta: factor from implicit rewards to rewards, above 0.
        advantage_clip: a, largest absolute advantage, above 0.
        loss_type: "mse", or "bce" (binary cross-entropy).
        weight_temp: temperature T of the weights q, above 0; null: uniform weights.
        centre: centre rewards within each "prompt", or over the micro-batch ("batch").
        kl: weight of the squared difference to the base, at least 0.
        kl_floor: that weight for the samples with R = 0, at most ``kl``.
        kl_guidance: guidance scale of the base in that term; 1 is none.
        time: the S stratified times of a sample.
        trail: schedule of the decay of v_old's moving average.
        sampler_trail: schedule of the decay of the moving average that samples the rounds.
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
        # r = -(e_theta / w_theta - e_old / w_old), (S, B)
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
        """Return the mean loss of implicit rewards (S, B), with gradient, against rewards (B,)."""
        group = group if self.centre == "prompt" else torch.zeros_like(group)
        reward = reward.expand_as(implicit)
        pools = [torch.zeros_like(reward)]
        if self.weight_temp is not None:
            pools = [reward / self.weight_temp, -reward / self.weight_temp]
        # q (softmax over each prompt), R_c = R - sum q R, and r_c = r - sg(sum q r)
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
    """Return the mean squared error (S B,) over the detached mean absolute error (e / w above)."""
    error = (prediction - rows.target).flatten(1)
    return (error**2).mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


CARD = MethodCard(
    name="crd",
    title="CRD",
    paper="Zhu et al., Diffusion Reinforcement Learning via Centered Reward Distillation",
    year=2026,
    arxiv="2603.14128",
    data=DataKind.ROLLOUTS,
    cost="a time: 1 policy sample with gradient, 3 without (moving average, guided base)",
    method=CRD,
    advantages=True,
    whole=True,
    trailing="both",
)
