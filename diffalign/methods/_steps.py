"""Functions that methods of recorded sampler steps share: log-densities, clipped losses and pairs of steps.

A batch of transitions holds the kernel and the guidance scale that drew it, so that densities are those of
the draw. Policy and reference are called once for samples with equal inputs (``batch.state``); the reference
is not called if the rollout has recorded its means (``reference_mean``).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import OncePerState, StepLikelihood, log_density, transition
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast, contrast, difference, pareto
from diffalign.losses.pairwise import PairwiseLoss
from diffalign.losses.policy_gradient import limited, limits, ppo
from diffalign.methods.registry import MethodCard
from diffalign.types import Batch, Denoiser, Kernel, Step, Transition


@runtime_checkable
class OverSteps(Protocol):
    """The attributes of a method of rival steps that ``rivals`` reads."""

    @property
    def beta(self) -> float:
        """The factor from log-ratios to rewards."""
        ...

    @property
    def clip(self) -> float:
        """Half the width of the interval around 1 to which the ratio of the densities is clipped."""
        ...

    @property
    def kl(self) -> float:
        """The weight of the KL to the reference."""
        ...


def check_clip(clip: float) -> None:
    """Raise UserError unless 0 < clip < 1."""
    if not 0 < clip < 1:
        raise UserError(f"method.clip={clip}; allowed: more than 0 and less than 1")


def check_preference(method: OverSteps) -> None:
    """Raise UserError if beta, clip or kl of a method of rival steps is out of range."""
    if not method.beta > 0:
        raise UserError(f"method.beta={method.beta}; allowed: more than 0")
    check_clip(method.clip)
    if not method.kl >= 0:
        raise UserError(f"method.kl={method.kl}; allowed: 0 or more")


def kernel_of(batch: Batch[Transition], card: MethodCard) -> Kernel:
    """Return the kernel that drew the batch.

    Raises:
        UserError: the batch holds no recorded steps.
    """
    if isinstance(batch.x, Transition) and batch.kernel is not None:
        return batch.kernel
    raise UserError(
        f"method {card.name} learns from rollouts, and this batch holds finished samples; allowed with it: a "
        f"`rollout` section (rollout.prompts, with rollout.shape auto or {card.rollout})"
    )


def advantage_of(batch: Batch[Any], card: MethodCard) -> Tensor:
    """Return the advantages (B,) of a rollout's samples or steps.

    Raises:
        UserError: the batch is not of a rollout, or the rollout has no advantages.
    """
    if card.rollout != "samples":
        kernel_of(batch, card)
    if "advantage" in batch.extra:
        return batch.extra["advantage"]
    raise UserError(
        f"method {card.name} learns from rollouts with advantages, and this batch has none; allowed with it: "
        "a `rollout` section with rollout.advantage (and rollout.combine sum or wins)"
    )


def as_drawn(denoiser: Denoiser, batch: Batch[Transition], detached: bool = False) -> Denoiser:
    """Return the denoiser with the guidance of the rollout and one network call per distinct state.

    ``detached`` stops the gradient through the negative prediction.
    """
    if batch.state is None or batch.guidance == 1 or detached:
        once = denoiser if batch.state is None else OncePerState(denoiser, batch.state)
        return once if batch.guidance == 1 else Guided(once, batch.negative, batch.guidance, detached)
    # Guidance calls the network on 2B samples, so that there are twice as many states.
    both = torch.cat([batch.state, batch.state + batch.state.max() + 1])
    return Guided(OncePerState(denoiser, both), batch.negative, batch.guidance)


def likelihood(
    policy: Denoiser, reference: Denoiser, batch: Batch[Transition], card: MethodCard, detached: bool = False
) -> StepLikelihood:
    """Return the log-densities (B,) of the recorded steps under both networks, and the KL of their steps.

    ``detached`` is that of ``as_drawn``.

    Raises:
        UserError: the batch is not of a rollout.
    """
    kernel, mean = kernel_of(batch, card), batch.extra.get("reference_mean")
    guided = as_drawn(reference, batch) if mean is None else reference  # not called if its mean is recorded
    return transition(as_drawn(policy, batch, detached), guided, batch.x, batch.cond, kernel, mean)


def density(policy: Denoiser, batch: Batch[Transition], card: MethodCard, detached: bool = False) -> Tensor:
    """Return the log-densities (B,) of the recorded steps under the policy.

    ``detached`` is that of ``as_drawn``.

    Raises:
        UserError: the batch is not of a rollout.
    """
    kernel, x = kernel_of(batch, card), batch.x
    return log_density(kernel, x.x_s, *kernel(as_drawn(policy, batch, detached), x.x_t, x.t, x.s, batch.cond))


class StepMeans(NamedTuple):
    """Means of recorded steps under the policy and when drawn.

    Attributes:
        mean: (B, *d) means of the policy's steps, with gradient.
        std: (B, 1, ...) standard deviations of the steps.
        drawn_mean: (B, *d) means with which the steps were drawn.
    """

    mean: Tensor
    std: Tensor
    drawn_mean: Tensor


def step_means(
    policy: Denoiser, batch: Batch[Transition], card: MethodCard, detached: bool = False
) -> StepMeans:
    """Return the means of recorded steps under the policy and when drawn.

    ``detached`` is that of ``as_drawn``.

    Raises:
        UserError: the batch is not of a rollout, or its rollout did not record the means.
    """
    kernel, x = kernel_of(batch, card), batch.x
    if "drawn_mean" not in batch.extra:
        raise UserError(
            f"method {card.name} learns from the means of steps as they were drawn, and this batch has none; "
            "allowed with it: rounds that were sampled for this method"
        )
    mean, std = kernel(as_drawn(policy, batch, detached), x.x_t, x.t, x.s, batch.cond)
    return StepMeans(mean, std, batch.extra["drawn_mean"].to(mean))


@runtime_checkable
class OfAdvantages(Protocol):
    """The attributes of a method of steps with advantages that ``surrogate`` reads."""

    @property
    def clip(self) -> float:
        """Half the width of the interval around 1 to which the ratio to the sampling policy is clipped."""
        ...

    @property
    def advantage_clip(self) -> float:
        """The largest absolute advantage."""
        ...


def check_advantages(method: OfAdvantages) -> None:
    """Raise UserError if clip or advantage_clip is out of range."""
    check_clip(method.clip)
    check_advantage_clip(method.advantage_clip)


def check_kl(kl: float | None) -> None:
    """Raise UserError if the weight of a method's KL is negative."""
    if kl is not None and not kl >= 0:
        raise UserError(f"method.kl={kl}; allowed: 0 or more, or null for no reference")


def check_advantage_clip(value: float) -> None:
    """Raise UserError unless the bound of advantages is above 0."""
    if not value > 0:
        raise UserError(f"method.advantage_clip={value}; allowed: more than 0")


def surrogate(
    method: OfAdvantages,
    logp: Tensor,
    batch: Batch[Transition],
    card: MethodCard,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the mean clipped loss of the recorded steps (PPO), its metrics and the step's weight.

    Args:
        method: bounds of ratio and advantage.
        logp: (B,) log-densities under the policy, with gradient.
        batch: the recorded steps.
        card: card of the method, for messages.
        weights: (B,) factors of the clipped losses.

    Raises:
        UserError: the batch has no advantages.
    """
    advantage = advantage_of(batch, card).clamp(-method.advantage_clip, method.advantage_clip)
    losses, ratio = ppo(logp - batch.x.logp.to(logp), advantage.to(logp), method.clip)
    if weights is not None:
        losses = losses * weights.to(losses)
    metrics = {
        "ratio": ratio.mean(),
        "clip_fraction": ((ratio - 1).abs() > method.clip).to(ratio).mean(),
        "advantage": advantage.mean(),
    }
    return losses.mean(), metrics, advantage_weight(advantage)


def advantage_weight(advantage: Tensor) -> Tensor:
    """Return the weight of a mean over recorded steps with advantages (B,).

    It is their number, or 0 if all advantages are 0 (a source pads an empty batch with such steps).
    """
    return advantage.ne(0).any() * float(len(advantage))


@dataclass(frozen=True)
class Rivals:
    """Pairs of rival steps of a batch.

    Attributes:
        limited: pairs with clipped log-ratios.
        raw: (B,) log-ratios before the clip, without gradient.
        kl: (B,) KL of the policy to the reference.
    """

    limited: Contrast
    raw: Tensor
    kl: Tensor

    def mean_of_both(self, values: Tensor) -> Tensor:
        """Return the scalar mean of ``values`` (B,) over the members of pairs that are not tied."""
        return self.limited.mean((values[self.limited.better] + values[self.limited.worse]) / 2)


def rivals(
    method: OverSteps, policy: Denoiser, reference: Denoiser, batch: Batch[Transition], card: MethodCard
) -> Rivals:
    """Return the pairs of rival steps, ordered by scores (B,), or by Pareto dominance of scores (B, R)."""
    ll = likelihood(policy, reference, batch, card)
    lead = difference if batch.score.ndim == 1 else pareto
    pairs = contrast(limited(ll.log_ratio, method.clip), batch.score, batch.group, lead)
    return Rivals(pairs, ll.log_ratio.detach(), ll.kl)


def preference(
    method: OverSteps,
    loss: PairwiseLoss,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Transition],
    card: MethodCard,
) -> Step:
    """Return the mean of ``loss`` over pairs of rival steps that are not tied, plus the KL penalty.

    Metrics ``rewards/*`` are beta times the clipped log-ratio. ``log_ratios/*`` are not clipped, and
    ``rewards/accuracies`` is computed from them (equal ones count half). ``kl`` and ``clipped`` (the share of
    log-ratios outside the clip) are means over the members of the pairs.

    Raises:
        UserError: the batch is not of a rollout.
    """
    r = rivals(method, policy, reference, batch, card)
    pairs, kl = r.limited, r.mean_of_both(r.kl)
    value = pairs.mean(loss(method.beta * pairs.chosen, method.beta * pairs.rejected))
    if method.kl:
        value = value + method.kl * kl
    low, high = limits(method.clip)
    chosen, rejected = r.raw[pairs.better], r.raw[pairs.worse]
    correct = (chosen > rejected).to(r.raw) + 0.5 * (chosen == rejected).to(r.raw)
    metrics = {
        "loss": value,
        "rewards/chosen": method.beta * pairs.mean(pairs.chosen),
        "rewards/rejected": method.beta * pairs.mean(pairs.rejected),
        "rewards/margins": method.beta * pairs.mean(pairs.margin),
        "rewards/accuracies": pairs.mean(correct),
        "log_ratios/chosen": pairs.mean(chosen),
        "log_ratios/rejected": pairs.mean(rejected),
        "kl": kl,
        "clipped": r.mean_of_both(((r.raw < low) | (r.raw > high)).to(r.raw)),
    }
    return Step(value, {name: metric.detach() for name, metric in metrics.items()}, pairs.count)
