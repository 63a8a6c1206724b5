"""What the methods of single likes share (Diffusion-KTO on images, TKTO on captions): from log-ratios and
labels to a step.
"""

from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import elbo
from diffalign.losses.pointwise import Utility
from diffalign.methods._common import LIKED, OverStates, noisy
from diffalign.types import Batch, Cond, Denoiser, Likelihood, Random, Step
from diffalign.utils.distributed import mean_over_ranks

KL = Literal["mean", "class_means", "mismatched"]
"""What the value of a like is measured from: see ``methods.kto``."""


@runtime_checkable
class OfLikes(OverStates, Protocol):
    """A method of single likes: what this module reads off it."""

    @property
    def beta(self) -> float:
        """Makes rewards of log-ratios."""
        ...

    @property
    def utility(self) -> Utility:
        """Of a sample's value."""
        ...

    @property
    def kl(self) -> KL:
        """What a value is measured from."""
        ...

    @property
    def desirable_weight(self) -> float:
        """Weight of desirable samples."""
        ...

    @property
    def undesirable_weight(self) -> float:
        """Weight of undesirable ones."""
        ...

    @property
    def whole_batch(self) -> bool:
        """One sigmoid of the mean value, in place of the mean of utilities."""
        ...


def likelihoods(
    method: OfLikes,
    policy: Denoiser,
    reference: Denoiser,
    batch: Batch[Tensor],
    generator: Random | torch.Generator,
) -> tuple[Likelihood, Tensor]:
    """Return (likelihoods, log-ratios without gradient that ``method.kl`` is a mean of), each (B, *unit)."""
    z = noisy(method, policy, reference, batch, generator)
    ll = elbo(policy, reference, z, batch.cond, method.reduce)
    if method.kl != "mismatched":
        return ll, ll.log_ratio.detach()
    with torch.no_grad():
        return ll, elbo(policy, reference, z, other_prompts(batch), method.reduce).log_ratio


def other_prompts(batch: Batch[Tensor]) -> Cond:
    """Each sample's conditions replaced by those of the next group's first member, round the batch."""
    first = torch.stack([(batch.group == g).nonzero()[0, 0] for g in range(batch.num_groups)])
    index = first[(batch.group + 1) % batch.num_groups]
    return {name: value[index.to(value.device)] for name, value in batch.cond.items()}


def likes_step(method: OfLikes, ratios: Tensor, others: Tensor, score: Tensor) -> Step:
    """Return the mean of w_y (1 - h) over samples that are liked (score above 1/2) or disliked (below).

    Args:
        method: utility, weights and offset.
        ratios: (B, *unit) log-ratios.
        others: (B, *unit) log-ratios that the offset is a mean of.
        score: (B, *unit).
    """
    sign = (score - LIKED).sign().to(ratios)
    liked, disliked, counted = (sign > 0).to(ratios), (sign < 0).to(ratios), sign.abs()
    terms = counted.sum()
    kl = _offset(method, method.beta * others, liked, disliked)
    value = method.beta * ratios - kl
    weight = method.desirable_weight * liked + method.undesirable_weight * disliked
    if method.whole_batch:
        signed = weight * sign * value
        mean = signed.sum() / terms.clamp(min=1)
        # the value is that of all ranks, the gradient this rank's share of it
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
    beta: float, ratios: Tensor, right: Tensor, liked: Tensor, disliked: Tensor
) -> dict[str, Tensor]:
    """Means over the batch's likes ("chosen") and dislikes ("rejected"), 0 where it has none."""
    chosen, rejected = ((ratios * which).sum() / which.sum().clamp(min=1) for which in (liked, disliked))
    hits = (right > 0).to(right) + 0.5 * (right == 0).to(right)
    counted = liked + disliked
    return {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/margins": beta * (chosen - rejected),
        "rewards/accuracies": (hits * counted).sum() / counted.sum().clamp(min=1),
        "errors/chosen": -2 * chosen,
        "errors/rejected": -2 * rejected,
    }
