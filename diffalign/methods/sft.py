"""Supervised fine-tuning on the winners: the control that every comparison with a preference method needs.

The ordinary denoising loss (Ho et al. 2020, arXiv 2006.11239, equation 14) on the best-scored member of each
group; the "SFT" baseline of Wallace et al. 2023, arXiv 2311.12908. What the losers are it never sees. A
group whose best score is shared (a tie) says nothing about what is good and has weight 0.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.likelihood import PerSample, Reduce, denoising_error
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.times import Uniform
from diffalign.methods._common import NOISINGS, TIMES, noisy
from diffalign.methods.registry import MethodCard
from diffalign.types import Batch, Denoiser, Noising, Random, Step, TimeSampler


@dataclass(frozen=True)
class SFT:
    """Denoising loss on winners.

    Attributes:
        time: which times are trained on, one per group.
        noising: how latents become noisy states.
        reduce: what counts as one unit of a sample.
    """

    time: TimeSampler = choice(TIMES, Uniform())
    noising: Noising = choice(NOISINGS, Forward())
    reduce: Reduce = PerSample()

    needs_reference: ClassVar[bool] = False

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """The mean error of the policy on one winner per group; ``reference`` is not asked."""
        best, alone = winners(batch.score, batch.group)
        won = batch.select(best)
        z = noisy(self, policy, reference, won, generator)
        errors = denoising_error(policy, z, won.cond, self.reduce)
        weight = alone.to(errors)
        loss = (errors * weight).sum() / weight.sum().clamp(min=1)
        return Step(loss, {"loss": loss.detach()}, weight.sum())


def winners(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """(index, alone), each (G,): the best-scored sample of each group, and whether no rival shares its
    score.
    """
    rows = group[None, :] == torch.arange(int(group.max()) + 1)[:, None]
    table = torch.where(rows.to(score.device), score, score.new_tensor(-torch.inf))
    best = table.argmax(1)
    return best, (table == table.max(1, keepdim=True).values).sum(1) == 1


CARD = MethodCard(
    name="sft",
    title="SFT on winners",
    paper="Ho et al., Denoising Diffusion Probabilistic Models (loss); Wallace et al. 2023 (as the baseline)",
    year=2020,
    arxiv="2006.11239",
    data="pairs (winners only)",
    cost="1 policy sample with gradient",
    method=SFT,
)
