"""Moving averages of the policy that a method compares the policy with, or that sample its rounds.

``diffalign.runs.roles`` makes the average and a hook updates it. The method receives it inside its reference:
a ``Followed`` is the frozen base with the moving average as an attribute.
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
    """Schedule of the decay d of a moving average, average = d average + (1 - d) policy.

    d = min(limit, first + rate (step - start)), and 0 before ``start``: the average is close to the policy at
    first and changes more slowly later. AWM and DGPO have limit 0.3, rate 0.001; DiffusionNFT has 0.5, 0.001
    or 0.999, 0.0075 from step 75. With limit 0 the average is a copy that is updated every ``every`` steps.

    Attributes:
        limit: largest decay, in [0, 1).
        rate: increase of the decay per optimizer step, at least 0.
        start: optimizer step from which the decay increases, at least 0.
        every: optimizer steps between updates, at least 1; set it to those of a round for an average that
            samples the rounds.
        first: decay at ``start``, in [0, 1).
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
        """Return 1 - d, the policy's weight in the update after optimizer step ``step``."""
        if step < self.start:
            return 1.0
        return 1 - min(self.limit, self.first + self.rate * (step - self.start))


@runtime_checkable
class Trailing(Protocol):
    """A method with a moving average of the policy (``MethodCard.trailing``)."""

    @property
    def trail(self) -> Trail:
        """The schedule of the moving average's decay."""
        ...

    @property
    def trails(self) -> bool:
        """Whether the moving average is used; otherwise none is kept in memory."""
        ...


@runtime_checkable
class TrailingSampler(Trailing, Protocol):
    """A method with a second moving average, which samples its rounds (``MethodCard.trailing`` "both")."""

    @property
    def sampler_trail(self) -> Trail:
        """The schedule of the second moving average's decay."""
        ...


TRAILS: Mapping[str, type] = {"linear": Trail}


@dataclass(frozen=True, eq=False)
class Followed(Wrapper):
    """The frozen base as a denoiser, with the moving average of the policy as an attribute.

    Attributes:
        denoiser: the frozen base.
        trailing: the moving average, called without gradient.
    """

    trailing: Denoiser

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the base's prediction."""
        return self.denoiser(x_t, t, cond)


def trailing_of(reference: Denoiser, card: MethodCard) -> Denoiser:
    """Return the moving average of the policy.

    Raises:
        UserError: the reference has none.
    """
    if isinstance(reference, Followed):
        return reference.trailing
    raise UserError(
        f"method {card.name} needs a moving average of the policy, and its reference has none; allowed: "
        "a `Followed` reference, which a run makes"
    )
