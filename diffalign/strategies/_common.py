"""What strategies share: a method inside a strategy, denoisers that scale gradients or listen, and who won.

A method asks its policy; a wrapper between the two sees every prediction and every gradient. So a
strategy needs to know nothing of the method: ``Scaled`` leaves a prediction as it is and scales the gradient
that flows back through each of its rows; ``Listening`` keeps predictions for a further loss, so that no
network call happens twice. Both must know which row is whose, so the method has to ask about the batch's own
samples, in their order: Inversion-DPO does so with ``guidance: 1`` and ``subset: 1``.
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


@runtime_checkable
class Strategy(Protocol):
    """What composes with any method."""

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
        """Return one loss of ``method`` over one batch, changed as the strategy has it."""
        ...


@dataclass(frozen=True)
class Wrapped:
    """A method inside a strategy: a method again.

    Attributes:
        method: the method, which may be wrapped itself.
        strategy: what stands around it.
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
        """The unit of the method."""
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
        """One loss over one batch."""
        return self.strategy(self.method, policy, reference, batch, generator)

    def state_dict(self) -> dict[str, Any]:
        """Return what the method remembers; empty if it remembers nothing."""
        return self.inner.state_dict() if isinstance(self.inner, Stateful) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the method continue from ``state_dict``'s answer."""
        if isinstance(self.inner, Stateful):
            self.inner.load_state_dict(state)


def innermost(method: Method[Any]) -> Method[Any]:
    """Return a method without its strategies."""
    return innermost(method.method) if isinstance(method, Wrapped) else method


@dataclass(frozen=True, eq=False)
class Scaled(Wrapper):
    """A denoiser whose gradient is scaled row by row while its predictions stay what they are.

    Without gradient (an inversion, a diagnosis) it does nothing.

    Attributes:
        factors: (prediction without gradient, x_t, t) -> (B,) factors.
    """

    factors: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the denoiser's prediction."""
        prediction = self.denoiser(x_t, t, cond)
        if not torch.is_grad_enabled():
            return prediction
        held = prediction.detach()
        return held + expand(self.factors(held, x_t, t), held) * (prediction - held)


class Call(NamedTuple):
    """The inputs and the prediction of a denoiser; ``graded``: whether it had a gradient."""

    x_t: Tensor
    t: Tensor
    cond: Cond
    prediction: Tensor
    graded: bool


@dataclass(frozen=True, eq=False)
class Listening(Wrapper):
    """A denoiser that remembers its calls.

    Attributes:
        calls: all of them so far, in order.
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


def answer(held: Listening, call: Call) -> Tensor:
    """Return a reference's prediction at a call of the policy, without gradient: a recorded one, or else
    asked now.
    """
    for other in held.calls:
        if other.x_t is call.x_t and other.t is call.t and other.cond is call.cond:
            return other.prediction.detach()
    with torch.no_grad():
        return held.denoiser(call.x_t, call.t, call.cond)


def residual(denoiser: Denoiser, x0: Tensor, x_t: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
    """Prediction minus target, (B, *d), in float32 at least; the noise is read off ``x_t`` and ``x0``.

    Up to the factor 2 / D it is the gradient of the mean squared error in output space.
    """
    x0, x_t = at_least_float32(x0), at_least_float32(x_t)
    alpha, sigma = denoiser.path.coefficients(t)
    tiny = torch.finfo(sigma.dtype).tiny  # at sigma = 0 nothing is noise, and x_t - alpha x0 is 0
    eps = (x_t - expand(alpha, x0) * x0) / expand(sigma.clamp(min=tiny), x0)
    target = regression_target(denoiser.target, denoiser, Noised(x0, eps, x_t, t))
    return at_least_float32(prediction) - target


def readable(method: Method[Any], name: str) -> Method[Any]:
    """Return ``method``, whose targets can be read off its noisy states.

    Raises:
        UserError: its noising perturbs x_t by noise that is not in the target.
    """
    if isinstance(method.noising, Forward) and method.noising.input_perturbation:
        raise UserError(
            f"strategy {name} reads the target off x_t, which "
            f"method.noising.input_perturbation={method.noising.input_perturbation} hides; allowed with it: 0"
        )
    return method


def check_rows(batch: Batch[Tensor], x_t: Tensor, name: str) -> None:
    """Check that the rows of a policy call are the batch's samples.

    Raises:
        UserError: they are others, so that nobody can tell whose gradient is whose.
    """
    if x_t.shape != batch.x.shape:
        raise UserError(
            f"strategy {name}: the method asks the policy about {tuple(x_t.shape)} where the batch has "
            f"{tuple(batch.x.shape)}; allowed: methods that ask about the batch's own samples, in their order"
        )


def by_group(values: Tensor, group: Tensor, how: str = "sum") -> Tensor:
    """Values (B, *n) gathered by group, (G, *n): "sum", "mean", "amax" or "amin" over the members."""
    index = group.to(values.device).reshape((-1,) + (1,) * (values.ndim - 1)).expand_as(values)
    out = values.new_zeros((int(group.max()) + 1, *values.shape[1:]))
    return out.scatter_reduce(0, index, values, how, include_self=False)


def overall(score: Tensor) -> Tensor:
    """Return (B,) one score a sample: the mean over units where labels are dense."""
    return score.flatten(1).mean(1) if score.ndim > 1 else score


@dataclass(frozen=True)
class Sides:
    """Who is on which side, (B,) each: above or below the mean score of the group; a tie is on neither.

    For pairs these are winner and loser.
    """

    better: Tensor
    worse: Tensor


def sides(batch: Batch[Any]) -> Sides:
    """Return the two sides of every group of a batch."""
    score = overall(batch.score)
    group = batch.group.to(score.device)
    middle, top, bottom = (by_group(score, group, how)[group] for how in ("mean", "amax", "amin"))
    # Rounding of the mean must not make a winner of a tie.
    return Sides((score > middle) & (top > bottom), (score < middle) & (top > bottom))


def best(batch: Batch[Any]) -> tuple[Tensor, Tensor]:
    """Return (index, good), each (G,): the best sample of every group, and whether it is known to be good.

    It is where no rival shares its score; a sample without rivals is where it is liked.
    """
    score, group = overall(batch.score), batch.group.to(batch.score.device)
    top = by_group(score, group, "amax")
    is_top = (score == top[group]).to(score)
    size = by_group(torch.ones_like(score), group)
    good = (by_group(is_top, group) == 1) & ((size > 1) | (top > LIKED))
    order = torch.arange(len(score), device=score.device)
    first = by_group(torch.where(is_top > 0, order, len(order)), group, "amin")
    return first, good


def told(batch: Batch[Any]) -> Tensor:
    """Return (B,) whether a sample's group says anything: it has no rivals, or not all of them are tied."""
    score, group = overall(batch.score), batch.group.to(batch.score.device)
    alone = by_group(torch.ones_like(score), group) == 1
    return (alone | (by_group(score, group, "amax") > by_group(score, group, "amin")))[group]


def with_term(step: Step, name: str, term: Tensor, weight: float) -> Step:
    """Return ``step`` with ``weight * term`` added to its loss; ``loss`` is the sum, ``name`` the term.

    The term is a mean over groups and takes the step's own weight, which is exact under any split wherever
    each group has as many of the method's terms (pairs, ties included; likes).
    """
    loss = step.loss + weight * term
    metrics: Mapping[str, Tensor] = {**step.metrics, "loss": loss.detach(), name: term.detach()}
    return replace(step, loss=loss, metrics=metrics)


def mean_where(values: Tensor, keep: Tensor) -> Tensor:
    """Scalar mean of ``values`` (N,) where ``keep`` (N,) holds; 0, with a gradient path, where it nowhere
    does.
    """
    weight = keep.to(values)
    return (values * weight).sum() / weight.sum().clamp(min=1)
