"""What several methods share: component tables for configurations, the way from a batch to compared rivals,
and metrics under their usual names.
"""

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

LIKED = 0.5
"""A single sample is liked above this score, disliked below it, and neither at it."""

OverTime = Literal["constant", "alpha_squared"]
"""What an error weighs at time t: the same everywhere, or alpha(t)^2, which measures the error of a velocity
(a flow's, or v) in noise: |eps error|^2 = alpha^2 |v error|^2.
"""


@dataclass(frozen=True)
class ScoreRange:
    """The range of the scores that a method reads, which a run checks before it trains.

    Attributes:
        low: smallest allowed.
        high: largest allowed.
        rewards: whether it reads the reward of an image where there is one, else its label's score.
        tolerated: share of scores that may lie outside; a warning counts them.
        advice: how to bring scores into the range.
    """

    low: float
    high: float
    rewards: bool
    tolerated: float
    advice: str


@runtime_checkable
class OfScores(Protocol):
    """A method whose formula reads scores as numbers, not only their order."""

    @property
    def score_range(self) -> "ScoreRange":
        """What the scores must be."""
        ...


@runtime_checkable
class OverStates(Protocol):
    """A method that looks at noisy states: what ``noisy`` and ``compare`` read off it."""

    @property
    def time(self) -> TimeSampler:
        """Which times are trained on, one per group."""
        ...

    @property
    def noising(self) -> Noising:
        """How latents become noisy states."""
        ...

    @property
    def reduce(self) -> Reduce:
        """What counts as one unit of a sample."""
        ...


def times_like(t: Tensor, group: Tensor, x: Tensor) -> Tensor:
    """Return times per group (G,) as times per sample (B,), on x's device and in its precision (float32 at
    least).
    """
    return t[group.to(t.device)].to(x.device, torch.promote_types(x.dtype, torch.float32))


def guided(denoiser: Denoiser, batch: Batch[Tensor], scale: float) -> Denoiser:
    """Return the denoiser, guided away from what the batch names as negative unless ``scale`` is 1."""
    return denoiser if scale == 1 else Guided(denoiser, batch.negative, scale)


def noisy(
    method: OverStates,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Tensor],
    generator: Random | torch.Generator,
) -> Noised:
    """Return the noisy states of a batch: one time per group, by the denoiser that the noising names."""
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
    """Every two rivals of a batch by how much likelier training has made them, estimated by the ELBO."""
    z = noisy(method, policy, reference, batch, generator)
    log_ratio = elbo(policy, reference, z, batch.cond, method.reduce).log_ratio
    if over_time == "alpha_squared":
        alpha, _ = policy.path.coefficients(z.t)
        log_ratio = expand(alpha**2, log_ratio) * log_ratio
    return contrast(log_ratio, batch.score, batch.group)


def pair_losses(
    loss: PairwiseLoss, chosen: Tensor, rejected: Tensor, c: Contrast, batch: Batch[Any]
) -> Tensor:
    """Return the losses (P, *unit) of the rewards of the better and the worse, under the labels as given.

    Where the batch has ``votes``, P = v_w / (v_w + v_l) of them for the better sample, the label is soft:
    P l(h) + (1 - P) l(-h), the expectation of the loss over the voters. Of the logistic loss this is the
    cross-entropy of DPO's Bradley-Terry model with a soft label (Rafailov et al. 2023, arXiv 2305.18290,
    equation 7). A pair without votes keeps its hard label.
    """
    hard = loss(chosen, rejected)
    if "votes" not in batch.extra:
        return hard
    won, lost = (batch.extra["votes"].to(hard)[index] for index in (c.better, c.worse))
    share = (won / (won + lost)).nan_to_num(nan=1.0)
    return share * hard + (1 - share) * loss(rejected, chosen)


def preference_step(c: Contrast, losses: Tensor, scale: float | Tensor) -> Step:
    """Return the mean of ``losses`` (P, *unit) over what is no tie, with its metrics; ``scale`` makes rewards
    of log-ratios.
    """
    loss = c.mean(losses)
    return Step(loss, {"loss": loss.detach(), **preference_metrics(c, scale)}, c.count)


def preference_metrics(c: Contrast, scale: float | Tensor) -> dict[str, Tensor]:
    """Detached means over what is no tie, named as dashboards know them.

    ``rewards/*`` are ``scale`` times the log-ratio; an exactly equal prediction counts half in
    ``rewards/accuracies``. ``errors/*`` are policy minus reference denoising error: a winner's must not
    rise, however good the margin looks.
    """
    margin = c.margin.detach()
    right = (margin > 0).to(margin) + 0.5 * (margin == 0).to(margin)
    chosen, rejected = c.mean(c.chosen.detach()), c.mean(c.rejected.detach())
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * (chosen - rejected),
        "rewards/accuracies": c.mean(right),
        "errors/chosen": -2 * chosen,
        "errors/rejected": -2 * rejected,
    }
