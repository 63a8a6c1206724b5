"""The row of a method on the plane: its settings, its data, and what the result must be."""

import copy
from dataclasses import dataclass
from typing import Any

from diffalign.config.schema import RolloutConfig
from diffalign.plane.data import Maker, preferences
from diffalign.plane.online import align_online, plane_plan
from diffalign.plane.plane import Plane, PlaneNetwork, align
from diffalign.types import Batch, Method


@dataclass(frozen=True)
class PlaneRow:
    """One method on the plane.

    Attributes:
        method: with the settings that suit the plane.
        data: what it learns from, a maker of ``diffalign.plane.data``. Of ``captions`` the gain is of
            prompt fidelity, on a base that was trained with wrong labels; of all others it is of the height.
        steps: optimizer steps of ``groups`` groups.
        groups: groups a step; fewer for lists and for what asks the network often, so that a run stays
            within a second of one core.
        rate: learning rate.
        optimum: whether the result must be near the KL-regularised optimum of its mean reward.
        gain: that the measured quantity must rise by (and fall by, with flipped labels).
        falls: whether flipped labels must lower it (False for methods without labels).
        note: what is particular, for readers.
        rollout: of a method that learns from what it samples; it has no data.
        flow: whether it is of the flow version of the plane (``plane_flow`` has all the others there).
        sampling: steps of the sampler in which the result is measured; of a student that knows a few only, so
            many: it must then be nearer to the support than the base is in as many.
    """

    method: Method[Any]
    data: Maker = preferences
    steps: int = 150
    groups: int = 192
    rate: float = 4e-4
    optimum: bool = True
    gain: float = 0.15
    falls: bool = True
    note: str = ""
    rollout: RolloutConfig | None = None
    flow: bool = False
    sampling: int = 50

    def trained(
        self,
        base: PlaneNetwork,
        batch: Batch[Any] | None,
        seed: int = 0,
        flipped: bool = False,
        steps: int | None = None,
    ) -> PlaneNetwork:
        """Return a copy of ``base`` that has learnt from ``batch``, or online from what it samples itself
        (then ``flipped`` negates the judge; data are flipped already).
        """
        steps, method = steps or self.steps, copy.deepcopy(self.method)  # a run's memory ends with it
        if self.rollout is None:
            assert batch is not None
            return align(method, base, batch, steps=steps, seed=seed, groups=self.groups, rate=self.rate)
        return align_online(
            method,
            base,
            Plane(),
            self.rollout,
            steps=steps,
            batch_size=self.groups,
            seed=seed,
            rate=self.rate,
            flipped=flipped,
        )

    @property
    def round_steps(self) -> int:
        """Optimizer steps that one round is learnt for; 1 offline."""
        if self.rollout is None:
            return 1
        return plane_plan(self.rollout, self.groups, self.flow).micro_steps

    def sampled(self, steps: int) -> dict[str, int]:
        """Points that so many steps have sampled."""
        if self.rollout is None:
            return {}
        rounds = -(-steps // self.round_steps)
        return {"images": rounds * self.rollout.prompts_per_round * self.rollout.samples}


def online(shape: str, groups: int, **changes: Any) -> RolloutConfig:
    """How the plane is sampled: all of a round's points at once, 20 steps."""
    whole = {"prompts_per_round": groups, "batch_size": 4000, "steps": 20, **changes}
    return RolloutConfig(shape=shape, **whole)  # type: ignore[arg-type]


def sampled(groups: int, **changes: Any) -> RolloutConfig:
    """How a method of reward gradients samples the plane: 20 steps of the ODE."""
    return online("samples", groups, **{"samples": 1, "eta": 0.0, **changes})


def few_steps(samples: int) -> RolloutConfig:
    """How a student of four steps samples the plane, so many points a prompt from noises of their own."""
    return online("samples", 96, samples=samples, eta=0.0, steps=4, shared_noise=False)


def of_flow(shape: str, **changes: Any) -> RolloutConfig:
    """How the flow version is sampled: ten steps, four points a prompt."""
    return online(shape, 96, **{"steps": 10, "samples": 4, "advantage": "group_batch", **changes})
