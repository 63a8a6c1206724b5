"""Online training on the plane: prompts are its labels, the reward is the height of sampled points."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffalign.config.schema import OptimizerConfig, RolloutConfig, TrainingConfig
from diffalign.diffusion.paths import path_from_config
from diffalign.diffusion.samplers import grid_of, kernel_for
from diffalign.methods import REGISTRY
from diffalign.methods._distillation import Assisted, Distillation
from diffalign.methods._reward_gradients import Differentiating
from diffalign.plane.plane import (
    FLOW_SCHEDULER,
    LABELS,
    SCHEDULER,
    Plane,
    PlaneNetwork,
    data_batch,
    denoiser_of,
)
from diffalign.plane.source import TensorSource
from diffalign.plane.teacher import IdealTeacher
from diffalign.plane.trailing import followers
from diffalign.rollout.beside import WithData
from diffalign.rollout.noise import NoiseSource
from diffalign.rollout.rounds import Plan
from diffalign.rollout.setting import Setting, window_of
from diffalign.rollout.shapes import drawn_steps
from diffalign.rollout.source import OnlineSource, SamplingRoles
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from diffalign.types import Cond, Denoiser, Method

PROMPTS = ("anywhere", "left", "right")  # the labels 0, 1, 2
TAU = 0.8  # temperature of the optimum that the teacher samples


class PlaneRolloutModel:
    """A ``rollout.model.RolloutModel``: a prompt is a label, pixels are the points themselves."""

    shape = (2,)
    device = torch.device("cpu")
    at_once = None

    def encode(self, prompts: Sequence[str], ahead: Iterable[str] = ()) -> tuple[Cond, Cond]:
        """Return labels (B,), and the negative label "anywhere" (B,)."""
        label = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        return {"label": label}, {"label": torch.zeros_like(label)}

    def decode(self, latents: Tensor) -> Tensor:
        """Return points (B, 2) unchanged."""
        return latents

    def opened(self) -> nullcontext[None]:
        """Return an empty context."""
        return nullcontext()


class Height:
    """A ``rollout.judges.Judge``: the height of points, independent of the time of the estimate."""

    rewards = ("height",)
    weights = (1.0,)

    def __init__(self, plane: Plane, flipped: bool = False):
        """Take the plane; ``flipped`` negates the height, as a control."""
        self._plane, self._sign = plane, -1.0 if flipped else 1.0
        self.judged = 0

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> "Future[Tensor]":
        """Return a finished future of scores (B, 1)."""
        self.judged += len(images)
        done: Future[Tensor] = Future()
        done.set_result(self._sign * self._plane.reward(images)[:, None])
        return done

    def close(self) -> None:
        """Do nothing: there is no resource to release."""


def align_online(
    method: Method[Any],
    base: PlaneNetwork,
    plane: Plane,
    rollout: RolloutConfig,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
    rate: float = 4e-4,
    flipped: bool = False,
) -> PlaneNetwork:
    """Return a copy of ``base`` that is trained online on its own samples, with the base as reference.

    Args:
        method: the method.
        base: the initial network.
        plane: the plane whose height is the reward.
        rollout: the sampling, with a shape other than "auto"; guidance is 1, times are those of
            ``rollout.steps``.
        steps: optimizer steps.
        batch_size: groups a step.
        seed: seed of all randomness.
        rate: learning rate.
        flipped: whether the reward is minus the height, as a control.
    """
    network = copy.deepcopy(base)
    policy, setting = denoiser_of(network), plane_setting(rollout, base.flow)
    behind = followers(method, base, denoiser_of)
    card = next((card for card in REGISTRY.values() if card.method is type(method)), None)
    reference = behind.reference
    if card is not None:
        setting = replace(setting, means=card.means, taught=card.taught, by_reference=card.by_reference)
        if card.taught:
            reference = IdealTeacher(policy.path, policy.target, -TAU if flipped else TAU)
    assistants = {name: copy.deepcopy(base) for name in (card.assistants if card else ())}
    settings = TrainingConfig(steps=steps, batch_size=batch_size, seed=seed)
    sampler = behind.sampler or policy
    roles = SamplingRoles(sampler, reference if method.needs_reference else None, network)
    source: OnlineSource | NoiseSource | WithData = _source(
        method, roles, plane, rollout, setting, batch_size=batch_size, seed=seed, flipped=flipped
    )
    if card is not None and card.beside and isinstance(source, OnlineSource):
        source = WithData(source, _real(plane, batch_size, seed))
    train(
        method=method,
        denoiser_of=lambda prepared: _policy(replace(policy, network=prepared), assistants),
        reference=reference,
        network=network,
        parameters=[*network.named_parameters(), *_of_assistants(assistants)],
        source=source,
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=1e-4),
        accelerator=accelerator_for(settings),
        hooks=behind.hooks,
        kept=behind.kept,
    )
    return network


def _real(plane: Plane, batch_size: int, seed: int) -> TensorSource:
    """Return a source of points of the data, for methods that also learn from data."""
    data = data_batch(plane, 4096, seed)
    return TensorSource(
        data.x[:, None], data.score[:, None], {name: v[:, None] for name, v in data.cond.items()},
        batch_size=batch_size, seed=seed,
    )  # fmt: skip


def _policy(policy: Denoiser, assistants: Mapping[str, PlaneNetwork]) -> Denoiser:
    """Return the policy, with its assistants if the method has any."""
    if not assistants:
        return policy
    return Assisted(policy, {name: denoiser_of(network) for name, network in assistants.items()})


def _of_assistants(assistants: Mapping[str, PlaneNetwork]) -> list[tuple[str, Any]]:
    """Return the parameters of the assistants with their names."""
    return [(f"{name}.{n}", p) for name, network in assistants.items() for n, p in network.named_parameters()]


def _source(
    method: Method[Any],
    roles: SamplingRoles,
    plane: Plane,
    rollout: RolloutConfig,
    setting: Setting,
    *,
    batch_size: int,
    seed: int,
    flipped: bool,
) -> OnlineSource | NoiseSource:
    """Return a method's source: rounds of samples, or noise for methods that differentiate the reward."""
    flow = isinstance(roles.network, PlaneNetwork) and roles.network.flow
    if isinstance(method, Differentiating | Distillation):
        sign = -1.0 if flipped else 1.0
        return NoiseSource(
            PlaneRolloutModel(),
            lambda points, prompts: sign * worded(plane, points, prompts),
            PROMPTS,
            setting,
            groups=batch_size,
            samples=setting.samples,
            seed=seed,
        )
    return OnlineSource(
        roles,
        PlaneRolloutModel(),
        Height(plane, flipped),
        PROMPTS * (rollout.prompts_per_round // LABELS),
        config=rollout,
        shape=rollout.shape,
        setting=setting,
        plan=plane_plan(rollout, batch_size, flow),
        seed=seed,
    )


def worded(plane: Plane, points: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return rewards (W N,) of points (N, 2) under W N prompts: heights, negated for prompts "low. label"."""
    heights = plane.reward(points).repeat(len(prompts) // len(points))
    return heights * torch.tensor([-1.0 if prompt.startswith("low. ") else 1.0 for prompt in prompts])


def plane_setting(rollout: RolloutConfig, flow: bool = False) -> Setting:
    """Return the sampling setting of the plane: no guidance, the grid of its path."""
    path, _ = path_from_config(FLOW_SCHEDULER if flow else SCHEDULER)
    return Setting(
        kernel_for(path, rollout.eta, rollout.form, rollout.density),
        grid_of(path, rollout.steps),
        1.0,
        rollout.samples,
        rollout.shared_noise,
        rollout.first_branch,
        rollout.inner_steps,
        rollout.estimate,
        window=window_of(rollout, 0),
    )


def plane_plan(rollout: RolloutConfig, batch_size: int, flow: bool = False) -> Plan:
    """Return the plan of a round: its groups, slots, batch size and passes."""
    slots = 1
    if rollout.shape != "samples":
        path, _ = path_from_config(FLOW_SCHEDULER if flow else SCHEDULER)
        first = rollout.first_branch if rollout.shape == "tree" else 0
        setting = replace(plane_setting(rollout, flow), taught=not rollout.eta)
        draws = drawn_steps(setting, path, first)
        slots = max(1, round(rollout.trained_steps * draws))
    return Plan(rollout.prompts_per_round, slots, batch_size, rollout.passes)
