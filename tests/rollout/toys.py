"""Stand-ins for online sources: numbered prompts on the plane, scripted judges, an instrumented policy."""

import copy
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.config.schema import RolloutConfig
from diffalign.diffusion.samplers import kernel_for, timesteps
from diffalign.plane.plane import LABELS, PlaneNetwork, denoiser_of
from diffalign.rollout.rounds import Plan
from diffalign.rollout.setting import Setting
from diffalign.rollout.source import OnlineSource, SamplingRoles
from diffalign.rollout.store import NOWHERE, RoundStore

PROMPTS = tuple(f"prompt {i}" for i in range(6))


def network(moved: float = 0.0, dtype: torch.dtype = torch.float32) -> PlaneNetwork:
    """Weights of one seed, or some way from them."""
    torch.manual_seed(3)
    made = PlaneNetwork(16, 4)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(moved * torch.randn(p.shape))
    return made.to(dtype)


@dataclass
class Studio:
    """Prompts are numbered, their labels follow; pixels are points, or flat pictures of their heights."""

    pictures: bool = False
    encoded: list[str] = field(default_factory=list)
    opened_times: int = 0
    shape: tuple[int, ...] = (2,)
    device: torch.device = torch.device("cpu")
    at_once: int | None = None

    def encode(self, prompts, ahead=()):
        self.encoded += prompts
        label = torch.tensor([int(prompt.split()[-1]) % LABELS for prompt in prompts])
        return {"label": label}, {"label": torch.zeros_like(label)}

    def decode(self, latents):
        if not self.pictures:
            return latents
        return (latents[:, 1] / 8 + 0.5).clamp(0, 1).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    @contextmanager
    def opened(self):
        self.opened_times += 1
        yield


@dataclass
class Script:
    """A judge whose scores (B,) or (B, R) are a function of (points, prompts, times)."""

    score: Callable[[Tensor, list[str], Tensor], Tensor] = lambda x, prompts, t: x[:, 1]
    rewards: tuple[str, ...] = ("height",)
    weights: tuple[float, ...] = (1.0,)
    fails_at: int | None = None  # the number of the question, from 0
    asked: list[list[str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    closed: bool = False

    def submit(self, images, prompts, t):
        if len(self.asked) == self.fails_at:
            raise RuntimeError("killed")
        self.asked.append(list(prompts))
        self.times += t.tolist()
        done: Future[Tensor] = Future()
        done.set_result(self.score(images, list(prompts), t).reshape(len(images), -1).float())
        return done

    def close(self):
        self.closed = True


def tied(*numbers: int) -> Script:
    """Heights, but of prompts of these numbers all are equal."""
    names = {f"prompt {n}" for n in numbers}
    return Script(lambda x, prompts, t: x[:, 1] * torch.tensor([float(p not in names) for p in prompts]))


@dataclass
class Watched:
    """A denoiser that notes how it is asked: (training, gradient, samples)."""

    inner: Any
    seen: list[tuple[bool, bool, int]] = field(default_factory=list)

    @property
    def path(self):
        return self.inner.path

    @property
    def target(self):
        return self.inner.target

    def __call__(self, x_t, t, cond):
        self.seen.append((self.inner.network.training, torch.is_grad_enabled(), len(x_t)))
        return self.inner(x_t, t, cond)


@dataclass
class World:
    """An online source and who is in it; fields are what tests vary."""

    shape: str = "trajectories"
    rollout: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 2
    guidance: float = 1.0
    store: RoundStore = NOWHERE
    judge: Any = None
    studio: Any = None
    moved: float = 0.1  # how far the policy is from the reference
    referred: bool = True
    dtype: torch.dtype = torch.float32
    rank: int = 0
    world: int = 1
    seed: int = 5

    def __post_init__(self) -> None:
        usual = {"prompts_per_round": 4, "samples": 3, "steps": 4, "first_branch": 1, "batch_size": 6}
        self.config = c = RolloutConfig(shape=self.shape, **usual | self.rollout)
        self.judge = self.judge or Script()
        self.studio = self.studio or Studio()
        self.network = network(self.moved, self.dtype)
        self.policy = Watched(denoiser_of(self.network))
        self.reference = denoiser_of(network(0, self.dtype)) if self.referred else None
        draws = c.steps - (c.first_branch if self.shape == "tree" else 0)
        slots = 1 if self.shape == "samples" else round(c.trained_steps * draws)
        slots *= c.samples // (c.part or c.samples)
        self.plan = Plan(c.prompts_per_round, slots, self.batch_size, c.passes, self.rank, self.world)
        self.setting = Setting(
            kernel_for(self.policy.path, c.eta),
            timesteps(c.steps),
            self.guidance,
            c.samples,
            c.shared_noise,
            c.first_branch,
            c.inner_steps,
            c.estimate,
            at_once=c.batch_size,
        )
        self.source = OnlineSource(
            SamplingRoles(self.policy, self.reference, self.network),
            self.studio,
            self.judge,
            PROMPTS,
            config=c,
            shape=self.shape,
            setting=self.setting,
            plan=self.plan,
            seed=self.seed,
            store=self.store,
        )

    def batches(self, count: int | None = None, start: int = 0) -> list[Any]:
        """Return the batches of a round, or ``count`` of them from a micro-step on."""
        self.source.seek(start)
        drawn = iter(self.source)
        return [next(drawn) for _ in range(count or self.plan.micro_steps)]

    def copy_of_policy(self) -> Any:
        """Return the policy with its current weights, for forwards with gradient."""
        return denoiser_of(copy.deepcopy(self.network))


def equal(one: Any, other: Any) -> bool:
    """Whether two batches are the same to the bit."""
    tensors = lambda b: [*(b.x if isinstance(b.x, tuple) else [b.x]), b.score, b.group, b.state]  # noqa: E731
    named = lambda b: b.cond | b.negative | b.extra  # noqa: E731
    return all(map(torch.equal, tensors(one), tensors(other))) and all(
        torch.equal(value, named(other)[name]) for name, value in named(one).items()
    )
