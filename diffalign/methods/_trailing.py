"""A policy that trails: a moving average of the one that is trained, which a method is held against or which
samples for it.

``diffalign.runs.roles`` makes it and a hook moves it. A method gets it as its reference: the frozen base,
which knows the trailing policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.methods.registry import MethodCard
from diffalign.types import Cond, Denoiser


@dataclass(frozen=True)
class Trail:
    """How fast it follows: trailing = d trailing + (1 - d) policy, d = min(limit, first + rate (step -
    start)), and 0 before ``start``.

    So it is close to the policy at first and the slower the longer a run goes on. AWM and DGPO have limit
    0.3, rate 0.001; DiffusionNFT 0.5, 0.001 or 0.999, 0.0075 from step 75. With limit 0 it is a copy that is
    made anew every ``every`` steps.

    Attributes:
        limit: of the decay.
        rate: by which it grows, per optimizer step.
        start: the step from which it grows.
        every: optimizer steps between moves; a round's, where it samples.
        first: the decay at ``start``.
    """

    limit: float = 0.3
    rate: float = 0.001
    start: int = 0
    every: int = 1
    first: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.limit < 1:
            raise UserError(f"method.trail.limit={self.limit}; allowed: 0 or more and less than 1")
        if self.rate < 0 or self.start < 0 or self.every < 1 or not 0 <= self.first < 1:
            raise UserError(
                f"method.trail: rate={self.rate}, start={self.start}, every={self.every}, "
                f"first={self.first}; allowed: 0 or more, 0 or more, 1 or more, 0 or more and less than 1"
            )

    def mix(self, step: int) -> float:
        """Return 1 - d, the policy's share in the move after optimizer step ``step``."""
        if step < self.start:
            return 1.0
        return 1 - min(self.limit, self.first + self.rate * (step - self.start))


@runtime_checkable
class Trailing(Protocol):
    """A method that a moving average of the policy belongs to (``MethodCard.trailing``)."""

    @property
    def trail(self) -> Trail:
        """How fast the moving average follows."""
        ...

    @property
    def trails(self) -> bool:
        """Whether the moving average is used; without it none is kept."""
        ...


@runtime_checkable
class TrailingSampler(Trailing, Protocol):
    """A method with a second moving average, which samples its rounds (``MethodCard.trailing`` "both")."""

    @property
    def sampler_trail(self) -> Trail:
        """How fast that one follows."""
        ...


TRAILS: Mapping[str, type] = {"linear": Trail}


@dataclass(frozen=True, eq=False)
class Followed(Wrapper):
    """The base as a denoiser, with the policy that trails.

    Attributes:
        denoiser: the base, frozen.
        trailing: the moving average, called without gradient.
    """

    trailing: Denoiser

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the base's prediction."""
        return self.denoiser(x_t, t, cond)


def trailing_of(reference: Denoiser, card: MethodCard) -> Denoiser:
    """Return the policy that trails.

    Raises:
        UserError: nobody does.
    """
    if isinstance(reference, Followed):
        return reference.trailing
    raise UserError(f"method {card.name} wants a policy that trails, and its reference is a plain one")
