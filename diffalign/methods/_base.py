"""Frozen base classes of methods: shared fields and checks; a method adds ``__call__``.

Their fields are keyword-only, so that a method's own fields come first in its constructor and in listings
(``own_first``).
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from typing import Any, ClassVar, Self

from diffalign.config.build import choice
from diffalign.diffusion.inversion import Inversion
from diffalign.diffusion.likelihood import PerSample
from diffalign.diffusion.noising import Forward
from diffalign.diffusion.times import Listed, LogitNormal, Mode, Uniform
from diffalign.errors import UserError
from diffalign.losses.pairwise import LOSSES, Logistic, PairwiseLoss
from diffalign.types import Noising, Reduce, TimeSampler

TIMES: Mapping[str, type] = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "listed": Listed}
NOISINGS: Mapping[str, type] = {"forward": Forward, "inversion": Inversion}


def check_positive(method: object, *names: str) -> None:
    """Raise UserError if a field of ``names`` is not more than 0."""
    for name in names:
        if not getattr(method, name) > 0:
            raise UserError(f"method.{name}={getattr(method, name)}; allowed: more than 0")


@dataclass(frozen=True, kw_only=True)
class StateMethod:
    """A method that trains on noisy states of clean latents.

    Attributes:
        time: distribution of the training times, one draw per group.
        noising: map from clean latents to noisy states.
        reduce: reduction of squared errors (B, *d) to units of a sample.
    """

    time: TimeSampler = choice(TIMES, Uniform())
    noising: Noising = choice(NOISINGS, Forward())
    reduce: Reduce = PerSample()

    needs_reference: ClassVar[bool] = True

    def at_times(self, times: TimeSampler) -> Self:
        """Return the method with its times drawn by ``times``."""
        return replace(self, time=times)


@dataclass(frozen=True, kw_only=True)
class ScaledMethod(StateMethod):
    """A method on noisy states whose rewards are ``beta`` times log-ratios, with ``beta`` above 0.

    Attributes:
        beta: weight of the KL to the reference, above 0: the reward of a sample is beta (r - m) / 2 with the
            mean squared denoising errors r of the reference and m of the policy.
    """

    beta: float = 5000.0

    def __post_init__(self) -> None:
        check_positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class PairMethod(ScaledMethod):
    """A method of pairs of rivals with a pairwise loss.

    Attributes:
        loss: pairwise loss of the rewards of two rivals.
    """

    loss: PairwiseLoss = choice(LOSSES, Logistic())


@dataclass(frozen=True)
class RolloutMethod:
    """A method of rollouts, without ``Noising`` and without a distribution of times.

    It trains on recorded steps, or draws the times of finished samples itself.
    """

    noising: ClassVar[None] = None
    reduce: ClassVar[Reduce] = PerSample()

    def at_times(self, times: TimeSampler) -> Self:
        """Return the method itself."""
        return self


def own_first(method: type) -> list[Field[Any]]:
    """Return the fields of a method, with those of ``StateMethod`` last."""
    shared = {f.name for f in fields(StateMethod)}
    return sorted(fields(method), key=lambda f: f.name in shared)
