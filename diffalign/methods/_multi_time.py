"""Finished samples noised at several times, for online methods without log-densities.

AWM, CRD, DiffusionNFT and DGPO use the forward process only, so that any sampler may have made the samples.
Each sample is noised at S times; the S B rows are ordered by time, then by sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import at_least_float32, regression_target
from diffalign.diffusion.noising import add_noise, rank_in_group
from diffalign.diffusion.randomness import normal, uniform
from diffalign.diffusion.times import shifted
from diffalign.errors import UserError, unknown
from diffalign.methods._common import times_like
from diffalign.types import Batch, Cond, Denoiser, Noised, Random, Step
from diffalign.utils.transfer import sent

_KINDS = ("discrete", "discrete_wo_init", "logit_normal", "uniform")


@dataclass(frozen=True)
class Stratified:
    """Stratified times: S per group, one in each of S equal parts of the distribution ``over``.

    Source: AWM, Xue et al. 2025, arXiv 2509.25050, released code.

    discrete           times of the sampler's steps 0 .. int(fraction T) - 1 of T (``Batch.grid``)
    discrete_wo_init   the same without step 0, which is pure noise
    logit_normal       sigmoid of normal quantiles, shifted, at least 0.01
    uniform            low to 1, shifted

    Differences from the released code: each group has its own draw, there all groups of a minibatch share
    one.

    Attributes:
        over: distribution of the times, one of the above.
        strata: number S of times, at least 1; null: all of the discrete steps.
        fraction: share of the discrete steps that is trained on, from the noisiest, in (0, 1].
        shift: time shift of "logit_normal" and "uniform" times, above 0.
        low: smallest "uniform" time before the shift, in [0, 1).
    """

    over: Literal["discrete", "discrete_wo_init", "logit_normal", "uniform"] = "discrete_wo_init"
    strata: int | None = 6
    fraction: float = 0.9
    shift: float = 3.0
    low: float = 0.2

    def __post_init__(self) -> None:
        if self.over not in _KINDS:
            raise unknown("time.over", self.over, _KINDS)
        if self.strata is None and not self.over.startswith("discrete"):
            raise UserError(f"time.strata=None over {self.over} times; allowed: 1 or more")
        if (self.strata is not None and self.strata < 1) or not 0 < self.fraction <= 1:
            raise UserError(
                f"time.strata={self.strata}, fraction={self.fraction}; allowed: 1 or more, above 0 up to 1"
            )
        if not (self.shift > 0 and 0 <= self.low < 1):
            raise UserError(
                f"time.shift={self.shift}, low={self.low}; allowed: more than 0, 0 or more below 1"
            )

    def __call__(
        self, count: int, generator: Random | torch.Generator, grid: Tensor | None
    ) -> Float[Tensor, "count S"]:
        """Return float64 times (count, S); ``grid`` (T + 1,) are the times of the sampler.

        Raises:
            UserError: discrete times without a ``grid``, or more strata than steps.
        """
        if not self.over.startswith("discrete"):
            assert self.strata is not None
            part = (
                torch.arange(self.strata) + uniform(generator, count, (self.strata,)).double()
            ) / self.strata
            if self.over == "uniform":
                return shifted(self.low + part * (1 - self.low), self.shift)
            return shifted(torch.special.ndtri(part).sigmoid(), self.shift).clamp(min=0.01)
        if grid is None:
            raise UserError(
                f"time.over={self.over!r} of samples without sampling times; allowed: logit_normal, uniform"
            )
        first = 0 if self.over == "discrete" else 1
        edges = self._edges(first, int((len(grid) - 1) * self.fraction))
        u = uniform(generator, count, (len(edges) - 1,)).double()
        return grid.double()[(edges[:-1] + (u * edges.diff()).long()).cpu()]

    def count(self, steps: int) -> int:
        """Return S for a sampler of ``steps`` steps."""
        if self.strata is not None:
            return self.strata
        return max(1, int(steps * self.fraction) - (self.over == "discrete_wo_init"))

    def _edges(self, first: int, last: int) -> Tensor:
        """Return the bounds (S + 1,) of the parts of the steps ``first`` to ``last`` - 1."""
        strata = last - first if self.strata is None else self.strata
        if not 0 < strata <= last - first:
            raise UserError(
                f"time.strata={self.strata} over the steps {first} to {last - 1} of the sampler; allowed: at "
                "most the number of steps"
            )
        return first + (last - first) * torch.arange(strata + 1) // strata


@dataclass(frozen=True)
class NoisedRows:
    """S B rows of noisy states with the policy's predictions.

    Attributes:
        z: noisy states.
        cond: conditions of the rows, every tensor (S B, ...).
        negative: negative conditions of guidance, every tensor (S B, ...).
        prediction: the policy's predictions (S B, *d), with gradient, in float32 or wider.
        target: regression targets (S B, *d).
        strata: number S of times.
    """

    z: Noised
    cond: Cond
    negative: Cond
    prediction: Tensor
    target: Tensor
    strata: int

    def by_time(self, rows: Tensor) -> Tensor:
        """Return rows (S B,) as (S, B)."""
        return rows.unflatten(0, (self.strata, -1))

    @torch.no_grad()
    def predicted_by(self, denoiser: Denoiser, guidance: float = 1.0) -> Tensor:
        """Return another denoiser's predictions (S B, *d), with a guidance scale, without gradient."""
        if guidance != 1:
            denoiser = Guided(denoiser, self.negative, guidance)
        return at_least_float32(denoiser(self.z.x_t, self.z.t, self.cond))

    def distance(self, other: Tensor) -> Tensor:
        """Return the mean squared difference (S B,) of the policy's prediction and another, (S B, *d)."""
        return _mean_square(self.prediction - other)

    def error(self, prediction: Tensor) -> Tensor:
        """Return the mean squared error (S B,) of a prediction (S B, *d)."""
        return _mean_square(prediction - self.target)


def _mean_square(difference: Tensor) -> Tensor:
    return (difference**2).flatten(1).mean(1)


def detached_step(metrics: Mapping[str, Tensor], batch: Batch[Any]) -> Step:
    """Return the step with ``metrics["loss"]`` as its loss and the number of samples as its weight."""
    loss = metrics["loss"]
    return Step(loss, {k: v.detach() for k, v in metrics.items()}, loss.new_full((), len(batch.group)))


def noised_rows(
    time: Stratified, policy: Denoiser, batch: Batch[Any], generator: Random | torch.Generator, shared: bool
) -> NoisedRows:
    """Return the samples of a batch noised at several times, with the policy's predictions.

    Args:
        time: distribution of the S times of a group.
        policy: the policy, called once, with gradient.
        batch: finished samples.
        generator: source of times and noise.
        shared: whether rivals share their noise at a time.
    """
    t = time(batch.num_groups, generator, batch.grid)
    strata, rank = t.shape[1], rank_in_group(batch.group)
    members = 1 if shared else int(rank.max()) + 1
    noise = normal(generator, batch.num_groups, (strata, members, *batch.x.shape[1:])).cpu()
    eps = noise[batch.group, :, 0 if shared else rank].transpose(0, 1).flatten(0, 1)
    eps = sent(eps, batch.x)
    times = times_like(t, batch.group, batch.x).T.flatten()
    x0 = batch.x.repeat(strata, *(1 for _ in batch.x.shape[1:]))
    cond, negative = (
        {name: v.repeat(strata, *(1 for _ in v.shape[1:])) for name, v in named.items()}
        for named in (batch.cond, batch.negative)
    )
    z = Noised(x0, eps, add_noise(policy, x0, eps, times), times)
    prediction = at_least_float32(policy(z.x_t, times, cond))
    target = at_least_float32(regression_target(policy.target, policy, z))
    return NoisedRows(z, cond, negative, prediction, target, strata)
