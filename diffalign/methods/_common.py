"""Functions that several methods share: from a batch to compared rivals, losses of pairs, and metrics."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import elbo
from diffalign.diffusion.noising import expand
from diffalign.diffusion.times import fitted
from diffalign.losses.contrast import Contrast, contrast
from diffalign.losses.pairwise import PairwiseLoss
from diffalign.types import Batch, Denoiser, Noised, Noising, Random, Reduce, Step, TimeSampler
from diffalign.utils.transfer import sent

LIKED = 0.5
"""Score above which a single sample is liked and below which it is disliked."""

OverTime = Literal["constant", "alpha_squared"]
"""Weight of an error at time t: 1, or alpha(t)^2, which converts a squared error of a velocity to one of the
noise: |eps error|^2 = alpha^2 |v error|^2.
"""


@dataclass(frozen=True)
class ScoreRange:
    """Range of the scores that a method reads, which a run checks before training.

    Attributes:
        low: smallest allowed score.
        high: largest allowed score.
        rewards: whether the method reads ``extra["reward"]`` if the data has it, else the label's score.
        tolerated: share of scores that may lie outside, in [0, 1]; a warning counts them.
        advice: text for the user on how to bring scores into the range.
    """

    low: float
    high: float
    rewards: bool
    tolerated: float
    advice: str


@runtime_checkable
class OfScores(Protocol):
    """A method whose formula depends on the values of scores, not only on their order."""

    @property
    def score_range(self) -> "ScoreRange":
        """The allowed range of the scores."""
        ...


@runtime_checkable
class OfExtras(Protocol):
    """A method or strategy that reads data beside the labels."""

    @property
    def extras(self) -> Collection[str]:
        """Names of ``Batch.extra`` that it reads where the data has them, with these settings."""
        ...


def extras_of(*parts: object) -> frozenset[str]:
    """Return the names of ``Batch.extra`` that methods and strategies read."""
    return frozenset(name for part in parts if isinstance(part, OfExtras) for name in part.extras)


@runtime_checkable
class OverStates(Protocol):
    """The attributes of a method on noisy states that ``noisy`` and ``compare`` read."""

    @property
    def time(self) -> TimeSampler:
        """The distribution of the training times, one draw per group."""
        ...

    @property
    def noising(self) -> Noising:
        """The map from clean latents to noisy states."""
        ...

    @property
    def reduce(self) -> Reduce:
        """The reduction of squared errors to units of a sample."""
        ...


def times_like(t: Tensor, group: Tensor, x: Tensor) -> Tensor:
    """Return times per group (G,) as times per sample (B,), on x's device, in float32 or x's wider dtype."""
    per_sample = t[sent(group, t.device)].to(torch.promote_types(x.dtype, torch.float32))
    return sent(per_sample, x.device)


def guided(denoiser: Denoiser, batch: Batch[Tensor], scale: float) -> Denoiser:
    """Return the denoiser with guidance against the batch's negative conditions; itself for a scale of 1."""
    return denoiser if scale == 1 else Guided(denoiser, batch.negative, scale)


def noisy(
    method: OverStates,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Tensor],
    generator: Random | torch.Generator,
) -> Noised:
    """Return the noisy states of a batch, with one time per group, made by the method's noising."""
    time = fitted(method.time, policy.path, batch.x.shape[1:])
    t = times_like(time(batch.num_groups, generator), batch.group, batch.x)
    role = reference if method.noising.by == "reference" else policy
    denoiser = guided(role, batch, method.noising.guidance)
    return method.noising(denoiser, batch.x, t, batch.cond, batch.group, generator)


def compare(
    method: OverStates,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Tensor],
    generator: Random | torch.Generator,
    over_time: OverTime = "constant",
) -> Contrast:
    """Return the pairs of rivals of a batch, with log-ratios estimated by the ELBO."""
    z = noisy(method, policy, reference, batch, generator)
    log_ratio = elbo(policy, reference, z, batch.cond, method.reduce).log_ratio
    if over_time == "alpha_squared":
        alpha, _ = policy.path.coefficients(z.t)
        log_ratio = expand(alpha**2, log_ratio) * log_ratio
    return contrast(log_ratio, batch.score, batch.group)


def pair_losses(
    loss: PairwiseLoss, chosen: Tensor, rejected: Tensor, c: Contrast, batch: Batch[Any]
) -> Tensor:
    """Return the losses (P, *unit) of the rewards of the better and the worse samples.

    With ``votes`` in the batch, labels are soft: with P = v_w / (v_w + v_l) the share of votes for the better
    sample, the loss is P l(h) + (1 - P) l(-h), its expectation over the voters. For the logistic loss this is
    the cross-entropy of DPO's Bradley-Terry model with a soft label (Rafailov et al. 2023, arXiv 2305.18290,
    equation 7). A pair without votes has a hard label.
    """
    hard = loss(chosen, rejected)
    if "votes" not in batch.extra:
        return hard
    votes_better, votes_worse = (batch.extra["votes"].to(hard)[index] for index in (c.better, c.worse))
    share = (votes_better / (votes_better + votes_worse)).nan_to_num(nan=1.0)
    return share * hard + (1 - share) * loss(rejected, chosen)


def preference_step(c: Contrast, losses: Tensor, scale: float | Tensor) -> Step:
    """Return the step with the mean of ``losses`` (P, *unit) without ties, and the preference metrics.

    ``scale`` is the factor from log-ratios to the rewards of the metrics.
    """
    loss = c.mean(losses)
    return Step(loss, {"loss": loss.detach(), **preference_metrics(c, scale)}, c.count)


def preference_metrics(c: Contrast, scale: float | Tensor) -> dict[str, Tensor]:
    """Return detached means over the pairs that are not tied, under the names that DPO trainers use.

    ``rewards/*`` are ``scale`` times the log-ratio; a margin of exactly 0 counts half in
    ``rewards/accuracies``. ``errors/*`` are the denoising error of the policy minus that of the reference; if
    ``errors/chosen`` rises, the policy gets worse on winners even if the margin grows.
    """
    margin = c.margin.detach()
    correct = (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
    chosen, rejected = c.mean(c.chosen.detach()), c.mean(c.rejected.detach())
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * (chosen - rejected),
        "rewards/accuracies": c.mean(correct),
        "errors/chosen": -2 * chosen,
        "errors/rejected": -2 * rejected,
    }
