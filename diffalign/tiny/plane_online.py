"""The plane online: prompts are its labels, the judge is the height, the policy samples its own points."""

import copy
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import torch
from torch import Tensor

from diffalign.config import OptimizerConfig, RolloutConfig, TrainingConfig
from diffalign.rollout.rounds import Plan
from diffalign.rollout.shapes import Setting
from diffalign.rollout.source import Cast, OnlineSource
from diffalign.samplers import kernel_for, timesteps
from diffalign.tiny.plane import LABELS, Plane, PlaneNetwork, denoiser_of
from diffalign.training.acceleration import accelerator_for
from diffalign.training.loop import train
from diffalign.types import Cond, Method

PROMPTS = ("anywhere", "left", "right")  # the labels 0, 1, 2


class PlaneStudio:
    """A ``rollout.studio.Studio``: a prompt is a label, pixels are the points themselves."""

    shape = (2,)
    device = torch.device("cpu")

    def encode(self, prompts: Sequence[str]) -> tuple[Cond, Cond]:
        """Labels (B,), guided away from "anywhere"."""
        label = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
        return {"label": label}, {"label": torch.zeros_like(label)}

    def decode(self, latents: Tensor) -> Tensor:
        """Points (B, 2) as they are."""
        return latents

    def opened(self) -> nullcontext[None]:
        """Nothing to open."""
        return nullcontext()


class Height:
    """A ``rollout.judges.Judge``: the height of points, at whatever time they were estimated."""

    rewards = ("height",)
    weights = (1.0,)

    def __init__(self, plane: Plane, flipped: bool = False):
        """``flipped`` prefers low points: the control."""
        self._plane, self._sign = plane, -1.0 if flipped else 1.0
        self.judged = 0

    def submit(self, images: Tensor, prompts: Sequence[str], t: Tensor) -> "Future[Tensor]":
        """(B, 1) at once."""
        self.judged += len(images)
        done: Future[Tensor] = Future()
        done.set_result(self._sign * self._plane.reward(images)[:, None])
        return done

    def close(self) -> None:
        """Nothing to close."""


def align_online(
    method: Method,
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
    """A copy of ``base`` aligned by what it samples itself, with the base as its reference.

    Args:
        method: what learns.
        base: where it starts.
        plane: whose height is the reward.
        rollout: how to sample, its shape named; guidance is 1, times are those of ``rollout.steps``.
        steps: optimizer steps.
        batch_size: groups a step.
        seed: of everything.
        rate: learning rate.
        flipped: the lower the better.
    """
    network = copy.deepcopy(base)
    policy = denoiser_of(network)
    shape = rollout.shape
    setting = Setting(
        kernel_for(policy.path, rollout.eta),
        timesteps(rollout.steps),
        1.0,
        rollout.samples,
        rollout.shared_noise,
        rollout.first_branch,
        rollout.inner_steps,
        rollout.estimate,
    )
    settings = TrainingConfig(steps=steps, batch_size=batch_size, seed=seed)
    train(
        method=method,
        denoiser_of=denoiser_of,
        reference=denoiser_of(base),
        network=network,
        parameters=list(network.named_parameters()),
        source=OnlineSource(
            Cast(policy, denoiser_of(base) if method.needs_reference else None, network),  # type: ignore[attr-defined]
            PlaneStudio(),
            Height(plane, flipped),
            PROMPTS * (rollout.prompts_per_round // LABELS),
            rollout,
            shape,
            setting,
            plane_plan(rollout, batch_size),
            seed,
        ),
        settings=settings,
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=1e-4),
        accelerator=accelerator_for(settings),
    )
    return network


def plane_plan(rollout: RolloutConfig, batch_size: int) -> Plan:
    """Who learns what when: every step of the plane's sampler is a draw."""
    slots = {"samples": 1, "trajectories": rollout.steps, "tree": rollout.steps - rollout.first_branch}
    trained = max(1, round(rollout.trained_steps * slots[rollout.shape]))
    return Plan(rollout.prompts_per_round, trained, batch_size, rollout.passes)
