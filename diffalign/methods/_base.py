"""Frozen bases of methods: fields and checks that many methods share, no loss. Abstract: a method adds
``__call__``.

Their fields are keywords, so a method's own fields come first in its constructor and in listings
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
    """Raise the UserError for the first field of ``names`` that is not more than 0."""
    for name in names:
        if not getattr(method, name) > 0:
            raise UserError(f"method.{name}={getattr(method, name)}; allowed: more than 0")


@dataclass(frozen=True, kw_only=True)
class StateMethod:
    """A method over noisy states of clean latents.

    Attributes:
        time: which times are trained on, one per group.
        noising: how latents become noisy states.
        reduce: what counts as one unit of a sample.
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
    """A method over noisy states with a ``beta`` above 0, which makes rewards of log-ratios.

    Attributes:
        beta: weight of the KL to the reference, in units of a mean squared error with Diffusion-DPO's 1/2.
    """

    beta: float = 5000.0

    def __post_init__(self) -> None:
        check_positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class PairMethod(ScaledMethod):
    """A method of pairs of rivals.

    Attributes:
        loss: what a pair demands of its logit.
    """

    loss: PairwiseLoss = choice(LOSSES, Logistic())


@dataclass(frozen=True)
class RolloutMethod:
    """A method of rollouts: it learns from recorded steps, or chooses the times of its samples itself, so
    that it has no ``Noising`` and no choice of times.
    """

    noising: ClassVar[None] = None
    reduce: ClassVar[Reduce] = PerSample()

    def at_times(self, times: TimeSampler) -> Self:
        """Return the method itself."""
        return self


def own_first(method: type) -> list[Field[Any]]:
    """Return the fields of a method, those of the bases of this module last."""
    shared = {f.name for f in fields(StateMethod)}
    return sorted(fields(method), key=lambda f: f.name in shared)
