"""Students of few steps, and the assistants that follow what they sample.

A student is the policy: it samples itself, and a score says where its samples should move. That score is the
difference of the frozen base (the teacher, a run's reference) and of an assistant, a second trained network
that is fitted to the student's samples by plain denoising, so that it knows the density that they have.
``diffalign.runs.roles`` makes assistants of a card's names as further sets of adapters on the same frozen
base, so that memory is that of one network. Student and assistants have one optimizer: each loss reaches the
parameters of its own network only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.config.build import choice
from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import normal
from diffalign.diffusion.samplers import estimates_of
from diffalign.diffusion.times import Uniform, fitted
from diffalign.diffusion.wrapper import Wrapper
from diffalign.errors import UserError
from diffalign.methods._base import TIMES, RolloutMethod
from diffalign.methods._reward_gradients import Unrolled
from diffalign.types import Batch, Cond, Denoiser, Random, TimeSampler


@dataclass(frozen=True, eq=False)
class Assisted(Wrapper):
    """The student as a denoiser, with the networks that follow it.

    Attributes:
        denoiser: the student.
        assistants: by the names of the method's card.
    """

    assistants: Mapping[str, Denoiser]

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the student's prediction."""
        return self.denoiser(x_t, t, cond)


def assistant_of(policy: Denoiser, name: str) -> Denoiser:
    """Return an assistant of the student.

    Raises:
        UserError: the policy has none of that name.
    """
    if isinstance(policy, Assisted) and name in policy.assistants:
        return policy.assistants[name]
    raise UserError(f"the method needs an assistant {name!r}, and the policy has none of that name")


@dataclass
class Turn:
    """How many micro-batches a distillation has seen."""

    calls: int = 0


@dataclass(frozen=True, kw_only=True)
class Distillation(RolloutMethod):
    """A method that distils the frozen base into a student of as many steps as the run samples with.

    Attributes:
        guidance: scale of the teacher's classifier-free guidance; the student learns what it gives. 1: none.
        last: steps of the student's sampling that carry gradient; null: all.
        every: micro-batches of which the student learns from one and the assistants from all, so that they
            know what it samples (the two time scales of DMD2, arXiv 2405.14867). More than 1 needs one
            process.
        time: at which times samples are noised and the scores compared.
    """

    guidance: float = 1.0
    last: int | None = 1
    every: int = 1
    time: TimeSampler = choice(TIMES, Uniform())
    turn: Turn = field(default_factory=Turn, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"method.last={self.last}; allowed: 1 or more, or null for all steps")
        if self.every < 1:
            raise UserError(f"method.every={self.every}; allowed: 1 or more")
        if self.guidance < 0:
            raise UserError(f"method.guidance={self.guidance}; allowed: 0 or more")

    @property
    def needs_reference(self) -> bool:
        """Yes: it is the teacher."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches seen."""
        return {"calls": self.turn.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``'s answer."""
        self.turn.calls = int(state["calls"])

    def learns(self) -> bool:
        """Return whether the student learns from this micro-batch, and count it; always without gradients."""
        if not torch.is_grad_enabled():
            return True
        self.turn.calls += 1
        return self.turn.calls % self.every == 0

    def sampled(self, policy: Denoiser, batch: Batch[Tensor], learns: bool = True) -> Tensor:
        """Return the student's samples (B, *d) of the batch's noise, with gradient if it learns."""
        sampling = Unrolled(policy, None, batch)
        first = 0 if self.last is None else max(0, sampling.steps - self.last)
        if not learns:
            first = sampling.steps
        carries = torch.arange(sampling.steps)[:, None] >= first
        return sampling.run(carries.expand(-1, len(batch.x)).to(batch.x.device))

    def teacher(self, reference: Denoiser, batch: Batch[Tensor]) -> Denoiser:
        """Return the frozen base under the teacher's guidance of the samples of ``batch``."""
        return reference if self.guidance == 1 else Guided(reference, batch.negative, self.guidance)

    def times(self, policy: Denoiser, x: Tensor, generator: Random | torch.Generator) -> Tensor:
        """Return times (B,) of B samples, one draw each."""
        drawn = fitted(self.time, policy.path, x.shape[1:])(len(x), generator)
        return drawn.to(x)

    def followed(
        self, assistant: Denoiser, x: Tensor, cond: Cond, generator: Random | torch.Generator
    ) -> Float[Tensor, " B"]:
        """Return the assistant's denoising error (B,) of the student's samples (B, *d), with times and noise
        of its own.
        """
        x0 = x.detach()
        t = self.times(assistant, x0, generator)
        eps = normal(generator, len(x0), x0.shape[1:]).to(x0)
        predicted = noise_of(assistant, add_noise(assistant, x0, eps, t), t, cond)
        return (predicted - eps).square().flatten(1).mean(1)


def noise_of(denoiser: Denoiser, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
    """Return the noise that a denoiser finds in ``x_t``, (B, *d), whatever it predicts."""
    if torch.is_grad_enabled():
        # Calls without gradient leave casts of weights in autocast's cache, which would cut the graph.
        torch.clear_autocast_cache()
    return at_least_float32(estimates_of(denoiser, denoiser(x_t, t, cond), x_t, t)[1])
