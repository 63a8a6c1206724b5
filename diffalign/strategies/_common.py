"""Parts that strategies share: the wrapped method, wrappers of denoisers, and the winners of a batch.

A strategy wraps the policy that the method calls, so that it needs no knowledge of the method. ``Scaled``
returns the prediction unchanged and scales the gradient of each of its rows; ``Recording`` stores the
predictions for an additional loss, so that no network call is made twice. Both match the rows of a call to
the samples of the batch, so the method must call the policy on the batch's own samples, in their order:
Inversion-DPO does so with ``guidance: 1`` and ``subset: 1``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from diffalign.diffusion.likelihood import at_least_float32, regression_target
from diffalign.diffusion.noising import Forward, expand
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.methods._common import LIKED
from diffalign.types import (
    Batch,
    Cond,
    Denoiser,
    Method,
    Noised,
    Noising,
    Random,
    Reduce,
    Stateful,
    Step,
    TimeSampler,
)
from diffalign.utils.transfer import sent


@runtime_checkable
class Strategy(Protocol):
    """Change a method's training step without knowledge of the method."""

    @property
    def needs_reference(self) -> bool:
        """Whether the strategy itself calls the reference."""
        ...

    def wrap(self, method: Method[Any]) -> Method[Any]:
        """Return ``method`` inside this strategy.

        Raises:
            UserError: the two do not compose.
        """
        ...

    def __call__(
        self,
        method: Method[Any],
        policy: Denoiser,
        reference: Denoiser,
        batch: Batch[Any],
        generator: Random | torch.Generator,
    ) -> Step:
        """Return the step of ``method`` for one batch, modified by the strategy."""
        ...


@dataclass(frozen=True)
class Wrapped:
    """A method inside a strategy; it satisfies ``types.Method`` itself.

    Attributes:
        method: the method, which may itself be ``Wrapped``.
        strategy: the strategy that is applied to it.
    """

    method: Method[Any]
    strategy: Strategy

    @property
    def inner(self) -> Method[Any]:
        """The method without any strategy."""
        return innermost(self.method)

    @property
    def noising(self) -> Noising | None:
        """The noising of the method."""
        return self.method.noising

    @property
    def reduce(self) -> Reduce:
        """The reduction from squared errors to units, as the method has it."""
        return self.method.reduce

    def at_times(self, times: TimeSampler) -> "Wrapped":
        """Return the same strategy around the method with its times drawn by ``times``."""
        return replace(self, method=self.method.at_times(times))

    @property
    def needs_reference(self) -> bool:
        """Whether the method or the strategy calls the reference."""
        return self.method.needs_reference or self.strategy.needs_reference

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Any], generator: Random | torch.Generator
    ) -> Step:
        """Return the step of the strategy for one batch."""
        return self.strategy(self.method, policy, reference, batch, generator)

    def state_dict(self) -> dict[str, Any]:
        """Return the method's state; empty for a method without state."""
        return self.inner.state_dict() if isinstance(self.inner, Stateful) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the method's state from the result of ``state_dict``."""
        if isinstance(self.inner, Stateful):
            self.inner.load_state_dict(state)


def innermost(method: Method[Any]) -> Method[Any]:
    """Return a method without its strategies."""
    return innermost(method.method) if isinstance(method, Wrapped) else method


@dataclass(frozen=True, eq=False)
class Scaled(Wrapper):
    """A denoiser whose gradient is scaled row by row; its predictions are unchanged.

    Calls under ``torch.no_grad`` (inversion, diagnostics) are passed through.

    Attributes:
        factors: (prediction without gradient, x_t, t) -> (B,) factors.
    """

    factors: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the denoiser's prediction."""
        prediction = self.denoiser(x_t, t, cond)
        if not torch.is_grad_enabled():
            return prediction
        value = prediction.detach()
        return value + expand(self.factors(value, x_t, t), value) * (prediction - value)


class Call(NamedTuple):
    """One call of a denoiser: inputs, prediction, and whether gradients were enabled (``graded``)."""

    x_t: Tensor
    t: Tensor
    cond: Cond
    prediction: Tensor
    graded: bool


@dataclass(frozen=True, eq=False)
class Recording(Wrapper):
    """A denoiser that records its calls.

    Attributes:
        calls: the calls so far, oldest first.
    """

    calls: list[Call] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the denoiser's prediction."""
        prediction = self.denoiser(x_t, t, cond)
        self.calls.append(Call(x_t, t, cond, prediction, torch.is_grad_enabled()))
        return prediction

    def of(self, batch: Batch[Tensor]) -> list[Call]:
        """Return the calls with gradient whose rows are the batch's samples."""
        return [call for call in self.calls if call.graded and call.x_t.shape == batch.x.shape]


def reference_prediction(reference: Recording, call: Call) -> Tensor:
    """Return the reference's prediction for the inputs of a policy call, (B, *d), without gradient.

    A recorded prediction for the same inputs is reused; otherwise the reference is called.
    """
    for recorded in reference.calls:
        if recorded.x_t is call.x_t and recorded.t is call.t and recorded.cond is call.cond:
            return recorded.prediction.detach()
    with torch.no_grad():
        return reference.denoiser(call.x_t, call.t, call.cond)


def residual(denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """Return prediction minus target, (B, *d), in float32 or wider.

    The noise of the target is computed from ``x_t`` and ``x0``. The residual is D / 2 times the gradient of
    the mean squared error (over D elements) with respect to the prediction.
    """
    x0, x_t = at_least_float32(x0), at_least_float32(x_t)
    alpha, sigma = denoiser.path.coefficients(t)
    tiny = torch.finfo(sigma.dtype).tiny  # at sigma = 0 the numerator x_t - alpha x0 is 0 too
    eps = (x_t - expand(alpha, x0) * x0) / expand(sigma.clamp(min=tiny), x0)
    target = regression_target(denoiser.target, denoiser, Noised(x0, eps, x_t, t))
    return at_least_float32(prediction) - target


def readable(method: Method[Any], name: str) -> Method[Any]:
    """Return ``method`` after a check that its targets can be computed from its noisy states.

    Raises:
        UserError: the method's noising perturbs x_t with noise that is not in the target.
    """
    if isinstance(method.noising, Forward) and method.noising.input_perturbation:
        raise UserError(
            f"strategy {name} computes the target from x_t, which "
            f"method.noising.input_perturbation={method.noising.input_perturbation} changes; allowed: 0"
        )
    return method


def check_rows(batch: Batch[Tensor], x_t: Tensor, name: str) -> None:
    """Check that the rows of a policy call are the batch's samples.

    Raises:
        UserError: the shapes differ, so that rows cannot be matched to samples.
    """
    if x_t.shape != batch.x.shape:
        raise UserError(
            f"strategy {name}: the method calls the policy on {tuple(x_t.shape)} where the batch has "
            f"{tuple(batch.x.shape)}; allowed: methods that call it on the batch's samples, in their order"
        )


def by_group(values: Tensor, group: Tensor, reduction: str = "sum") -> Tensor:
    """Return values (B, *n) reduced within each group, (G, *n): "sum", "mean", "amax" or "amin".

    ``group`` (B,) is on the CPU, where counting the groups does not wait for the accelerator.
    """
    index = sent(group, values.device).reshape((-1,) + (1,) * (values.ndim - 1)).expand_as(values)
    out = values.new_zeros((int(group.max()) + 1, *values.shape[1:]))
    return out.scatter_reduce(0, index, values, reduction, include_self=False)


def overall(score: Tensor) -> Tensor:
    """Return one score per sample, (B,): the mean over units where labels are dense."""
    return score.flatten(1).mean(1) if score.ndim > 1 else score


@dataclass(frozen=True)
class Sides:
    """Masks (B,) of the samples above (``better``) and below (``worse``) the mean score of their group.

    In a pair these are the winner and the loser; samples of a tied group are in neither.
    """

    better: Tensor
    worse: Tensor


def sides(batch: Batch[Any]) -> Sides:
    """Return the two sides of every group of a batch."""
    score = overall(batch.score)
    group = sent(batch.group, score.device)
    middle, top, bottom = (
        by_group(score, batch.group, reduction)[group] for reduction in ("mean", "amax", "amin")
    )
    # In a tied group a rounding error of the mean must not create a winner.
    return Sides((score > middle) & (top > bottom), (score < middle) & (top > bottom))


def best(batch: Batch[Any]) -> tuple[Tensor, Tensor]:
    """Return (index, good), each (G,): the best sample of every group, and whether it is a certain winner.

    ``good`` is true where no rival has the same score; for a group of one, where the sample is liked.
    """
    score, group = overall(batch.score), sent(batch.group, batch.score.device)
    top = by_group(score, batch.group, "amax")
    is_top = (score == top[group]).to(score)
    size = by_group(torch.ones_like(score), batch.group)
    good = (by_group(is_top, batch.group) == 1) & ((size > 1) | (top > LIKED))
    order = torch.arange(len(score), device=score.device)
    first = by_group(torch.where(is_top > 0, order, len(order)), batch.group, "amin")
    return first, good


def informative(batch: Batch[Any]) -> Tensor:
    """Return a mask (B,) of the samples whose group has one member or at least two different scores."""
    score, group = overall(batch.score), sent(batch.group, batch.score.device)
    alone = by_group(torch.ones_like(score), batch.group) == 1
    return (alone | (by_group(score, batch.group, "amax") > by_group(score, batch.group, "amin")))[group]


def with_term(step: Step, name: str, term: Tensor, weight: float) -> Step:
    """Return ``step`` with ``weight * term`` added to its loss; ``name`` logs the term.

    The term is a mean over groups and is weighted by the step's weight across micro-batches. The sum is
    independent of the split where all groups have the same number of the method's terms (pairs or likes).
    """
    loss = step.loss + weight * term
    metrics: Mapping[str, Tensor] = {**step.metrics, "loss": loss.detach(), name: term.detach()}
    return replace(step, loss=loss, metrics=metrics)


def mean_where(values: Tensor, keep: Tensor) -> Tensor:
    """Return the mean of ``values`` (N,) where ``keep`` (N,) is true; 0, with gradient, if it never is."""
    weight = keep.to(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)
