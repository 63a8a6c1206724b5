"""A row of the plane: a method with its settings, its data, and the required result."""

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
        method: the method, with settings tuned for the plane.
        data: maker of its training data, from ``diffalign.plane.data``. With ``captions`` the measured
            quantity is prompt fidelity, on a base trained with wrong labels; else it is the height.
        steps: optimizer steps.
        groups: groups a step; fewer for lists and for methods with many network calls, so that a run takes
            about a second on one core.
        rate: learning rate.
        optimum: whether the result must be near the KL-regularised optimum of its mean reward.
        gain: amount by which the measured quantity must rise, and fall with flipped labels.
        falls: whether flipped labels must lower it (False for methods without labels).
        note: remarks for readers.
        rollout: sampling of an online method, which has no data; None: offline.
        flow: whether the method needs the flow version of the plane.
        sampling: steps of the sampler for the measurement. A few-step student is measured at its own number
            of steps, and must then be nearer to the support than the base at that number.
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
        """Return a copy of ``base`` trained on ``batch``, or online on its own samples.

        ``flipped`` negates the reward of an online method; an offline ``batch`` is flipped by its maker.
        """
        steps, method = steps or self.steps, copy.deepcopy(self.method)  # a method's state is a run's own
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
        """The number of optimizer steps on each round; 1 offline."""
        if self.rollout is None:
            return 1
        return plane_plan(self.rollout, self.groups, self.flow).micro_steps

    def sampled(self, steps: int) -> dict[str, int]:
        """Return the number of points sampled in ``steps`` optimizer steps as {"images": n}; {} offline."""
        if self.rollout is None:
            return {}
        rounds = -(-steps // self.round_steps)
        return {"images": rounds * self.rollout.prompts_per_round * self.rollout.samples}


def online(shape: str, groups: int, **changes: Any) -> RolloutConfig:
    """Return a rollout on the plane: 20 steps, all of a round's points in one batch."""
    fields = {"prompts_per_round": groups, "batch_size": 4000, "steps": 20, **changes}
    return RolloutConfig(shape=shape, **fields)  # type: ignore[arg-type]


def sampled(groups: int, **changes: Any) -> RolloutConfig:
    """Return a rollout for methods with reward gradients: 20 steps of the ODE."""
    return online("samples", groups, **{"samples": 1, "eta": 0.0, **changes})


def few_steps(samples: int) -> RolloutConfig:
    """Return a rollout for four-step students: ``samples`` points a prompt, each from its own noise."""
    return online("samples", 96, samples=samples, eta=0.0, steps=4, shared_noise=False)


def of_flow(shape: str, **changes: Any) -> RolloutConfig:
    """Return a rollout on the flow version: ten steps, four points a prompt."""
    return online(shape, 96, **{"steps": 10, "samples": 4, "advantage": "group_batch", **changes})
