"""Diffusion-SDPO: the loser's gradient is scaled down until it cannot raise the winner's error.

Fu et al. 2025, arXiv 2511.03317, and the released code (AIDC-AI/Diffusion-SDPO). With gA, gB the gradients of
the winners' and the losers' mean squared errors in output space, the losers' gradient is multiplied by

    lambda = clip((1 - mu) |gA|^2 / (gA . gB), 0, 1)  where gA . gB > 0,  else 1,

and the value of the loss stays what it is. A step along -(gA - lambda gB) then lowers the winners' error at
least mu times as fast as one along -gA alone, to first order and in output space. Published: mu 0.9 for SD
1.5 and 0.6 for SDXL under Diffusion-DPO at beta 5000, 0.2 with DSPO, 0.9 with DMPO.

What differs from the released code: it is a wrapper of the policy, so it needs no branch in any method; for
groups larger than two the two sides are the members above and below the group's mean score, each side
averaged within its group, and ties count on neither. The batch that lambda is over is the micro-batch of all
processes together (two processes are one of twice the batch; there it is each process's own), not the
accumulated one: ``over: pair`` has one lambda a group instead, which no split changes.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.strategies._common import Scaled, Wrapped, by_group, check_rows, readable, residual, sides
from diffalign.strategies.masked import MaskedReduce
from diffalign.strategies.registry import StrategyCard
from diffalign.types import Batch, Denoiser, Method, Random, Step
from diffalign.utils.distributed import mean_over_ranks


@dataclass(frozen=True)
class SDPO:
    """Scale losers' gradients.

    Attributes:
        mu: how much of the winners' own descent is kept at least; 0 only forbids that their error rises.
        over: one lambda for the whole micro-batch of all processes, or one for each group.
    """

    mu: float = 0.9
    over: Literal["batch", "pair"] = "batch"

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise UserError(f"sdpo.mu={self.mu}; allowed: 0 to 1")

    def wrap(self, method: Method[Any]) -> Wrapped:
        """Return ``method`` with its losers' gradients scaled.

        Raises:
            UserError: its targets cannot be read off its noisy states.
        """
        return Wrapped(readable(method, "sdpo"), self)

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Tensor],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the method's loss, unchanged in value; ``sdpo/lambda`` is the mean factor of its losers."""
        used: list[Tensor] = []

        def factors(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            check_rows(batch, x_t, "sdpo")
            if batch.num_groups == len(batch.group):
                raise UserError("strategy sdpo: every group has one sample; allowed: pairs or lists")
            gradient = residual(policy, batch.x, x_t, t, prediction)
            if isinstance(method.reduce, MaskedReduce):
                gradient = method.reduce.over(gradient)
            rows, scale = losers(gradient, batch, self.mu, self.over == "batch")
            used.append(scale)
            return rows

        step = method(Scaled(policy, factors), reference, batch, generator)
        if not used:
            return step
        return replace(step, metrics={**step.metrics, "sdpo/lambda": torch.stack(used).mean()})


def losers(gradient: Tensor, batch: Batch[Tensor], mu: float, whole: bool = True) -> tuple[Tensor, Tensor]:
    """Return (factors of the rows (B,), mean factor of the groups that have two sides).

    Args:
        gradient: (B, *d) of each sample's error in output space, up to one common factor.
        batch: who is whose rival, and how good.
        mu: see ``SDPO``.
        whole: one lambda for all groups (of all processes: then a collective), else one for each.
    """
    two, rows = sides(batch), gradient.flatten(1)
    group = batch.group.to(rows.device)
    better, worse = (
        by_group(rows * side[:, None], group) / by_group(side.to(rows), group).clamp(min=1)[:, None]
        for side in (two.better.to(rows.device), two.worse.to(rows.device))
    )
    both = by_group((two.better | two.worse).to(rows), group, "amax")
    own, cross = (better * better).sum(1), (better * worse).sum(1)
    if whole:
        own, cross = (mean_over_ranks(v, both).expand(len(both)) for v in (own, cross))
    scale = torch.where(cross > 0, ((1 - mu) * own / cross.clamp(min=torch.finfo(cross.dtype).tiny)), 1.0)
    scale = scale.clamp(0, 1)
    mean = (scale * both).sum() / both.sum().clamp(min=1)
    return torch.where(two.worse.to(rows.device), scale[group], 1.0), mean


CARD = StrategyCard(
    name="sdpo",
    title="Diffusion-SDPO",
    paper="Fu et al., Safeguarded Direct Preference Optimization for Diffusion Models",
    year=2025,
    arxiv="2511.03317",
    composes="pairs and lists",
    cost="nothing",
    strategy=SDPO,
)
