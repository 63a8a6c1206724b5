"""Diffusion-SDPO: scale the loser's gradient so that a step does not raise the winner's error.

Fu et al. 2025, arXiv 2511.03317, and the released code (AIDC-AI/Diffusion-SDPO). With gA, gB the gradients of
the winners' and the losers' mean squared errors in output space, the losers' gradient is multiplied by

    lambda = clip((1 - mu) |gA|^2 / (gA . gB), 0, 1)  where gA . gB > 0,  else 1,

and the value of the loss is unchanged. A step along -(gA - lambda gB) then lowers the winners' error at least
mu times as fast as one along -gA alone, to first order and in output space. Published: mu 0.9 for SD 1.5 and
0.6 for SDXL under Diffusion-DPO at beta 5000, 0.2 with DSPO, 0.9 with DMPO.

Differences from the released code: the strategy wraps the policy, so that no method has a branch for it. In
groups of more than two, the sides are the members above and below the group's mean score, each side averaged
within its group; ties are on neither side. With ``over: batch`` lambda is computed over the micro-batches of
all processes (the released code: of each process), not over the accumulated batch; ``over: pair`` computes
one lambda per group, which does not depend on how a batch is split.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class SDPO:
    """Scale the gradients of losers.

    Attributes:
        mu: least share of the winners' own rate of descent that remains, in [0, 1]; at 0 their error may not
            rise, to first order.
        over: "batch": one lambda for the micro-batches of all processes; "pair": one for each group.
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
            UserError: the method's targets cannot be computed from its noisy states.
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
        """Return the method's loss, unchanged in value; metric ``sdpo/lambda`` is the mean factor.

        Raises:
            UserError: every group has one sample, or the method calls the policy on other samples.
        """
        scales: list[Tensor] = []

        def factors(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
            check_rows(batch, x_t, "sdpo")
            if batch.num_groups == len(batch.group):
                raise UserError("strategy sdpo: every group has one sample; allowed: pairs or lists")
            gradient = residual(policy, batch.x, x_t, t, prediction)
            if isinstance(method.reduce, MaskedReduce):
                gradient = method.reduce.over(gradient)
            rows, scale = losers(gradient, batch, self.mu, self.over == "batch")
            scales.append(scale)
            return rows

        step = method(Scaled(policy, factors), reference, batch, generator)
        if not scales:
            return step
        return replace(step, metrics={**step.metrics, "sdpo/lambda": torch.stack(scales).mean()})


def losers(gradient: Tensor, batch: Batch[Tensor], mu: float, shared: bool = True) -> tuple[Tensor, Tensor]:
    """Return the factors of the rows, (B,), and their scalar mean over the groups that have two sides.

    Args:
        gradient: (B, *d) gradient of each sample's error with respect to the prediction, up to a common
            factor.
        batch: the samples, of which groups and scores are read.
        mu: as in ``SDPO``.
        shared: one lambda for all groups of all processes (a collective operation), else one for each group.
    """
    side_masks, rows = sides(batch), gradient.flatten(1)
    group = sent(batch.group, rows.device)
    better, worse = (
        by_group(rows * side[:, None], batch.group)
        / by_group(side.to(rows), batch.group).clamp(min=1)[:, None]
        for side in (side_masks.better.to(rows.device), side_masks.worse.to(rows.device))
    )
    both = by_group((side_masks.better | side_masks.worse).to(rows), batch.group, "amax")
    norm_squared, inner_product = (better * better).sum(1), (better * worse).sum(1)
    if shared:
        norm_squared, inner_product = (
            mean_over_ranks(v, both).expand(len(both)) for v in (norm_squared, inner_product)
        )
    # lambda = clip((1 - mu) |gA|^2 / (gA . gB), 0, 1) where gA . gB > 0, else 1
    scale = torch.where(
        inner_product > 0,
        ((1 - mu) * norm_squared / inner_product.clamp(min=torch.finfo(inner_product.dtype).tiny)),
        1.0,
    )
    scale = scale.clamp(0, 1)
    mean = (scale * both).sum() / both.sum().clamp(min=1)
    return torch.where(side_masks.worse.to(rows.device), scale[group], 1.0), mean


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
