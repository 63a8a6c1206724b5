"""Functions that the methods of single likes share (Diffusion-KTO on images, TKTO on captions)."""

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.losses.pointwise import Utility
from diffalign.methods._common import LIKED, OverStates, noisy
from diffalign.types import Batch, Cond, Denoiser, Likelihood, Random, Step
from diffalign.utils.distributed import mean_over_ranks
from diffalign.utils.transfer import sent

KL = Literal["mean", "class_means", "mismatched"]
"""Estimate of the reference point of values: see ``methods.kto``."""


@runtime_checkable
class OfLikes(OverStates, Protocol):
    """The attributes of a method of single likes that this module reads."""

    @property
    def beta(self) -> float:
        """The factor from log-ratios to rewards."""
        ...

    @property
    def utility(self) -> Utility:
        """The utility of a sample's value."""
        ...

    @property
    def kl(self) -> KL:
        """The estimate of the reference point of values."""
        ...

    @property
    def desirable_weight(self) -> float:
        """The weight of desirable samples."""
        ...

    @property
    def undesirable_weight(self) -> float:
        """The weight of undesirable samples."""
        ...

    @property
    def whole_batch(self) -> bool:
        """Whether the loss is the sigmoid of the mean value instead of the mean of utilities."""
        ...


def likelihoods(
    method: OfLikes,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Tensor],
    generator: Random | torch.Generator,
) -> tuple[Likelihood, Tensor]:
    """Return the likelihoods, and the detached log-ratios whose mean is the reference point, (B, *unit)."""
    z = noisy(method, policy, reference, batch, generator)
    ll = elbo(policy, reference, z, batch.cond, method.reduce)
    if method.kl != "mismatched":
        return ll, ll.log_ratio.detach()
    with torch.no_grad():
        return ll, elbo(policy, reference, z, other_prompts(batch), method.reduce).log_ratio


def other_prompts(batch: Batch[Tensor]) -> Cond:
    """Return conditions in which each sample has those of the next group's first member (cyclically)."""
    first = torch.stack([(batch.group == g).nonzero()[0, 0] for g in range(batch.num_groups)])
    index = first[(batch.group + 1) % batch.num_groups]
    return {name: value[sent(index, value.device)] for name, value in batch.cond.items()}


def likes_step(method: OfLikes, ratios: Tensor, offsets: Tensor, score: Tensor) -> Step:
    """Return the step of the mean of w_y (1 - h) over liked (score above 1/2) and disliked (below) samples.

    Args:
        method: settings of utility, weights and reference point.
        ratios: (B, *unit) log-ratios, with gradient.
        offsets: (B, *unit) log-ratios whose mean is the reference point.
        score: (B, *unit) scores.
    """
    sign = (score - LIKED).sign().to(ratios)
    liked, disliked, counted = (sign > 0).to(ratios), (sign < 0).to(ratios), sign.abs()
    terms = counted.sum()
    kl = _offset(method, method.beta * offsets, liked, disliked)
    value = method.beta * ratios - kl  # v = (beta / 2) (r - m) - kl
    weight = method.desirable_weight * liked + method.undesirable_weight * disliked
    if method.whole_batch:
        signed = weight * sign * value
        mean = signed.sum() / terms.clamp(min=1)
        # the value is the mean over all ranks, the gradient is this rank's share of it
        loss = 1 - torch.sigmoid(mean_over_ranks(signed, counted) + mean - mean.detach())
    else:
        loss = (weight * (1 - method.utility(value, sign))).sum() / terms.clamp(min=1)
    metrics = _metrics(method.beta, ratios.detach(), (sign * value).detach(), liked, disliked)
    return Step(loss, {"loss": loss.detach(), "kl": kl, **metrics}, terms)


def _offset(method: OfLikes, rewards: Tensor, liked: Tensor, disliked: Tensor) -> Tensor:
    if method.kl == "class_means":
        return (mean_over_ranks(rewards, liked) + mean_over_ranks(rewards, disliked)) / 2
    mean = mean_over_ranks(rewards, liked + disliked)
    return mean.clamp(min=0) if method.kl == "mean" else mean


def _metrics(
    beta: float, ratios: Tensor, signed_value: Tensor, liked: Tensor, disliked: Tensor
) -> dict[str, Tensor]:
    """Return means over the batch's likes ("chosen") and dislikes ("rejected"); 0 if it has none."""
    chosen, rejected = ((ratios * mask).sum() / mask.sum().clamp(min=1) for mask in (liked, disliked))
    hits = (signed_value > 0).to(signed_value) + 0.5 * (signed_value == 0).to(signed_value)
    counted = liked + disliked
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * (chosen - rejected),
        "rewards/accuracies": (hits * counted).sum() / counted.sum().clamp(min=1),
        "errors/chosen": -2 * chosen,
        "errors/rejected": -2 * rejected,
    }
