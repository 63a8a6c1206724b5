"""Supervised fine-tuning on the winners: the control that every comparison with a preference method needs.

The ordinary denoising loss (Ho et al. 2020, arXiv 2006.11239, equation 14) on the best-scored member of each
group; the "SFT" baseline of Wallace et al. 2023, arXiv 2311.12908. What the losers are it never sees. A
group whose best score is shared (a tie) says nothing about what is good and has weight 0; so has a single
image that is not liked.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import denoising_error
from diffalign.methods._base import StateMethod
from diffalign.methods._common import LIKED, noisy
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True, kw_only=True)
class SFT(StateMethod):
    """Denoising loss on winners.

    Attributes:
    """

    needs_reference: ClassVar[bool] = False

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean error of the policy on one winner per group; ``reference`` is not called."""
        best, good = winners(batch.score, batch.group)
        won = batch.select(best)
        z = noisy(self, policy, reference, won, generator)
        errors = denoising_error(policy, z, won.cond, self.reduce)
        weight = good.to(errors)
        loss = (errors * weight).sum() / weight.sum().clamp(min=1)
        return Step(loss, {"loss": loss.detach()}, weight.sum())


def winners(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, good), each (G,): the best-scored sample of each group, and whether it is known to be
    good: no rival shares its score, and a sample without rivals is liked (a score above 1/2, as in ``kto``).
    """
    group, count = group.to(score.device), int(group.max()) + 1
    lowest = score.new_full((count,), -torch.inf)
    is_best = score == lowest.scatter_reduce(0, group, score, "amax")[group]
    place = torch.arange(len(score), device=score.device)
    last = place.new_full((count,), len(score) - 1)
    best = last.scatter_reduce(0, group, place.where(is_best, last[0]), "amin")
    alone, rivals = group[is_best].bincount(minlength=count) == 1, group.bincount(minlength=count) > 1
    return best, alone & (rivals | (score[best] > LIKED))


CARD = MethodCard(
    name="sft",
    title="SFT on winners",
    paper="Ho et al., Denoising Diffusion Probabilistic Models (loss); Wallace et al. 2023 (as the baseline)",
    year=2020,
    arxiv="2006.11239",
    data=DataKind.WINNERS,
    cost="1 policy sample with gradient",
    method=SFT,
)
