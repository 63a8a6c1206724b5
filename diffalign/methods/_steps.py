"""What methods over recorded sampler steps share: from a batch of transitions to log-densities, and from
rivals among them to a step.

A batch of transitions knows what drew it (``kernel``, ``guidance``), so a density is always scored by what
made the draw. Policy and reference make one forward for samples with equal inputs (``batch.state``), and the
reference makes none where the rollout stored its answer (``reference_mean``).
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
    """A method that compares rival steps: what ``rivals`` reads off it."""

    @property
    def beta(self) -> float:
        """Makes rewards of log-ratios."""
        ...

    @property
    def clip(self) -> float:
        """How far from 1 the ratio of the two densities may be."""
        ...

    @property
    def kl(self) -> float:
        """Weight of the KL to the reference."""
        ...


def check_clip(clip: float) -> None:
    """Raise UserError unless 0 < clip < 1."""
    if not 0 < clip < 1:
        raise UserError(f"method.clip={clip}; allowed: more than 0 and less than 1")


def check_preference(method: OverSteps) -> None:
    """Raise UserError where beta, clip or kl of a method of rival steps are out of range."""
    if not method.beta > 0:
        raise UserError(f"method.beta={method.beta}; allowed: more than 0")
    check_clip(method.clip)
    if not method.kl >= 0:
        raise UserError(f"method.kl={method.kl}; allowed: 0 or more")


def kernel_of(batch: Batch[Transition], card: MethodCard) -> Kernel:
    """Return the kernel that drew the batch.

    Raises:
        UserError: the batch holds no recorded steps: it is not of a rollout.
    """
    if isinstance(batch.x, Transition) and batch.kernel is not None:
        return batch.kernel
    raise UserError(
        f"method {card.name} learns from rollouts, and this batch holds finished samples; allowed with it: a "
        f"`rollout` section (rollout.prompts, with rollout.shape auto or {card.rollout})"
    )


def advantage_of(batch: Batch[Any], card: MethodCard) -> Tensor:
    """Return the advantages (B,) of what was sampled.

    Raises:
        UserError: the batch is not of a rollout, or of one without advantages.
    """
    if card.rollout != "samples":
        kernel_of(batch, card)
    if "advantage" in batch.extra:
        return batch.extra["advantage"]
    raise UserError(
        f"method {card.name} learns from rollouts with advantages, and this batch has none; allowed with it: "
        "a `rollout` section with rollout.advantage (and rollout.combine sum or wins)"
    )


def as_drawn(denoiser: Denoiser, batch: Batch[Transition], held: bool = False) -> Denoiser:
    """Return the denoiser, guided as when the batch was drawn, with one forward for each different state;
    ``held``: no gradient through what it is guided away from.
    """
    if batch.state is None or batch.guidance == 1 or held:
        once = denoiser if batch.state is None else OncePerState(denoiser, batch.state)
        return once if batch.guidance == 1 else Guided(once, batch.negative, batch.guidance, held)
    # Guidance asks about all samples twice, so that there are twice as many states.
    both = torch.cat([batch.state, batch.state + batch.state.max() + 1])
    return Guided(OncePerState(denoiser, both), batch.negative, batch.guidance)


def likelihood(
    policy: Denoiser, reference: Denoiser, batch: Batch[Transition], card: MethodCard, held: bool = False
) -> StepLikelihood:
    """Log-densities (B,) of the recorded steps under both, and the KL of the policy's to the reference's; see
    ``as_drawn`` for ``held``.

    Raises:
        UserError: the batch is not of a rollout.
    """
    kernel, known = kernel_of(batch, card), batch.extra.get("reference_mean")
    guided = as_drawn(reference, batch) if known is None else reference  # which is not called then
    return transition(as_drawn(policy, batch, held), guided, batch.x, batch.cond, kernel, known)


def density(policy: Denoiser, batch: Batch[Transition], card: MethodCard, held: bool = False) -> Tensor:
    """Log-density (B,) of the recorded steps under the policy alone; see ``as_drawn`` for ``held``.

    Raises:
        UserError: the batch is not of a rollout.
    """
    kernel, x = kernel_of(batch, card), batch.x
    return log_density(kernel, x.x_s, *kernel(as_drawn(policy, batch, held), x.x_t, x.t, x.s, batch.cond))


class Redrawn(NamedTuple):
    """Recorded steps as the policy would draw them now: ``mean`` (B, *d) with gradient and ``std``
    (B, 1, ...); and ``drawn_mean`` (B, *d), the mean that they were drawn with.
    """

    mean: Tensor
    std: Tensor
    drawn_mean: Tensor


def redrawn(policy: Denoiser, batch: Batch[Transition], card: MethodCard, held: bool = False) -> Redrawn:
    """Return the policy's means of recorded steps beside those that they were drawn with; see ``as_drawn``
    for ``held``.

    Raises:
        UserError: the batch is not of a rollout, or its rollout did not record the means.
    """
    kernel, x = kernel_of(batch, card), batch.x
    if "drawn_mean" not in batch.extra:
        raise UserError(
            f"method {card.name} learns from the means of steps as they were drawn, and this batch has none; "
            "allowed with it: rounds that were sampled for this method"
        )
    mean, std = kernel(as_drawn(policy, batch, held), x.x_t, x.t, x.s, batch.cond)
    return Redrawn(mean, std, batch.extra["drawn_mean"].to(mean))


@runtime_checkable
class OfAdvantages(Protocol):
    """A method of recorded steps with advantages: what ``surrogate`` reads off it."""

    @property
    def clip(self) -> float:
        """How far from 1 the ratio of policy and sampling policy is rewarded."""
        ...

    @property
    def advantage_clip(self) -> float:
        """Advantages further from 0 count as this."""
        ...


def check_advantages(method: OfAdvantages) -> None:
    """Raise UserError where clip or advantage_clip are out of range."""
    check_clip(method.clip)
    check_advantage_clip(method.advantage_clip)


def check_kl(kl: float | None) -> None:
    """Check the weight of a method's KL.

    Raises:
        UserError: it is negative.
    """
    if kl is not None and not kl >= 0:
        raise UserError(f"method.kl={kl}; allowed: 0 or more, or null for no reference")


def check_advantage_clip(value: float) -> None:
    """Raise UserError unless it is above 0."""
    if not value > 0:
        raise UserError(f"method.advantage_clip={value}; allowed: more than 0")


def surrogate(
    method: OfAdvantages,
    logp: Tensor,
    batch: Batch[Transition],
    card: MethodCard,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return (mean clipped loss of the recorded steps, metrics, weight), with log-densities ``logp`` (B,)
    under the policy; ``weights`` (B,) multiply the clipped losses.

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

    Sources leave out groups without advantage; one that stands in for a batch of them counts nothing.
    """
    return advantage.ne(0).any() * float(len(advantage))


@dataclass(frozen=True)
class Rivals:
    """Rival steps of a batch.

    Attributes:
        limited: pairs by their log-ratios inside the clip.
        raw: (B,) log-ratios as they are, without gradient.
        kl: (B,) KL of the policy to the reference.
    """

    limited: Contrast
    raw: Tensor
    kl: Tensor

    def mean_of_both(self, values: Tensor) -> Tensor:
        """Scalar mean of ``values`` (B,) over the members of pairs that are no tie."""
        return self.limited.mean((values[self.limited.better] + values[self.limited.worse]) / 2)


def rivals(
    method: OverSteps, policy: Denoiser, reference: Denoiser, batch: Batch[Transition], card: MethodCard
) -> Rivals:
    """Every two rivals of a batch by their scores (B,), or by Pareto where there are several, (B, R)."""
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
    """Return the mean of ``loss`` over pairs of rival steps that are no tie, with the penalty and its
    metrics.

    ``rewards/*`` are beta times what the loss sees, the log-ratio inside the clip; ``log_ratios/*`` are as
    they are, and decide ``rewards/accuracies`` (equal ones count half). ``kl`` and ``clipped`` (the share of
    log-ratios outside) are means over the members of the pairs.

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
    right = (chosen > rejected).to(r.raw) + 0.5 * (chosen == rejected).to(r.raw)
    metrics = {
        "loss": value,
        "rewards/chosen": method.beta * pairs.mean(pairs.chosen),
        "rewards/rejected": method.beta * pairs.mean(pairs.rejected),
        "rewards/margins": method.beta * pairs.mean(pairs.margin),
        "rewards/accuracies": pairs.mean(right),
        "log_ratios/chosen": pairs.mean(chosen),
        "log_ratios/rejected": pairs.mean(rejected),
        "kl": kl,
        "clipped": r.mean_of_both(((r.raw < low) | (r.raw > high)).to(r.raw)),
    }
    return Step(value, {name: metric.detach() for name, metric in metrics.items()}, pairs.count)
