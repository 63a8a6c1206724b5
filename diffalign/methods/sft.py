"""Supervised fine-tuning on the winners, the baseline of preference methods.

The ordinary denoising loss (Ho et al. 2020, arXiv 2006.11239, equation 14) on the best-scored member of each
group; the "SFT" baseline of Wallace et al. 2023, arXiv 2311.12908. Losers are not used. A group whose best
score is shared (a tie) has weight 0, and so has a single image that is not liked.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True, kw_only=True)
class SFT(StateMethod):
    """Minimise the denoising loss of winners."""

    needs_reference: ClassVar[bool] = False

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean error of the policy on one winner per group; ``reference`` is not called."""
        best, good = winners(batch.score, batch.group)
        winning = batch.select(best)
        z = noisy(self, policy, reference, winning, generator)
        errors = denoising_error(policy, z, winning.cond, self.reduce)
        weight = good.to(errors)
        loss = (errors * weight).sum() / weight.sum().clamp(min=1)
        return Step(loss, {"loss": loss.detach()}, weight.sum())


def winners(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index, good), each (G,): the best sample of each group, and whether it is a certain winner.

    ``good`` is true if no rival has the same score; for a group of one, if the sample is liked (a score above
    1/2, as in ``kto``).
    """
    group, count = sent(group, score.device), int(group.max()) + 1
    lowest = score.new_full((count,), -torch.inf)
    is_best = score == lowest.scatter_reduce(0, group, score, "amax")[group]
    index = torch.arange(len(score), device=score.device)
    last = index.new_full((count,), len(score) - 1)
    best = last.scatter_reduce(0, group, index.where(is_best, last[0]), "amin")
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
