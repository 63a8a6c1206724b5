"""Score distillation into students of few steps, with assistant networks.

The student is the policy. Its samples are moved along the difference of two scores: that of the frozen base
(the teacher, the run's reference) and that of an assistant, a second trained network that is fitted to the
student's samples by denoising and so models their density. ``diffalign.runs.roles`` makes the assistants that
a card names as additional adapters on the same frozen base, so that memory is that of one network. Student
and assistants share one optimizer; each loss has gradients to its own network only.
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
from diffalign.utils.transfer import sent


@dataclass(frozen=True, eq=False)
class Assisted(Wrapper):
    """The student as a denoiser, with its assistants as an attribute.

    Attributes:
        denoiser: the student.
        assistants: assistant networks by the names of the method's card.
    """

    assistants: Mapping[str, Denoiser]

    def __call__(self, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
        """Return the student's prediction."""
        return self.denoiser(x_t, t, cond)


def assistant_of(policy: Denoiser, name: str) -> Denoiser:
    """Return the student's assistant of a name.

    Raises:
        UserError: the policy has no assistant of that name.
    """
    if isinstance(policy, Assisted) and name in policy.assistants:
        return policy.assistants[name]
    raise UserError(f"the method needs an assistant {name!r}, and the policy has none of that name")


@dataclass
class Turn:
    """Number of micro-batches of a distillation so far."""

    calls: int = 0


@dataclass(frozen=True, kw_only=True)
class Distillation(RolloutMethod):
    """Base of methods that distil the frozen base into a student with the sampling steps of the run.

    Attributes:
        guidance: scale of the teacher's classifier-free guidance, at least 0; 1 is none.
        last: number of the student's last sampling steps with gradient, at least 1; null: all.
        every: the student is trained on every ``every``-th micro-batch, the assistants on all, so that they
            follow the student's density (the two time scales of DMD2, arXiv 2405.14867). Above 1 it needs one
            process.
        time: distribution of the times at which the scores are compared.
        turn: count of micro-batches; copies made by ``dataclasses.replace`` share it.
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
        """True: the reference is the teacher."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return the number of micro-batches so far."""
        return {"calls": self.turn.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the result of ``state_dict``."""
        self.turn.calls = int(state["calls"])

    def learns(self) -> bool:
        """Count a micro-batch; return whether the student is trained on it (true without gradients)."""
        if not torch.is_grad_enabled():
            return True
        self.turn.calls += 1
        return self.turn.calls % self.every == 0

    def sampled(self, policy: Denoiser, batch: Batch[Tensor], learns: bool = True) -> Tensor:
        """Return the student's samples (B, *d) of the batch's noise, with gradient if ``learns``."""
        sampling = Unrolled(policy, None, batch)
        first = 0 if self.last is None else max(0, sampling.steps - self.last)
        if not learns:
            first = sampling.steps
        carries = torch.arange(sampling.steps)[:, None] >= first
        return sampling.run(carries.expand(-1, len(batch.x)))

    def teacher(self, reference: Denoiser, batch: Batch[Tensor]) -> Denoiser:
        """Return the frozen base with the teacher's guidance for the samples of ``batch``."""
        return reference if self.guidance == 1 else Guided(reference, batch.negative, self.guidance)

    def times(self, policy: Denoiser, x: Tensor, generator: Random | torch.Generator) -> Tensor:
        """Return times (B,), one draw for each sample."""
        draws = fitted(self.time, policy.path, x.shape[1:])(len(x), generator)
        return sent(draws, x)

    def assistant_errors(
        self, assistant: Denoiser, x: Tensor, cond: Cond, generator: Random | torch.Generator
    ) -> Float[Tensor, " B"]:
        """Return the assistant's denoising errors (B,) on the student's samples (B, *d).

        Times and noise are drawn independently of those of the student's loss.
        """
        x0 = x.detach()
        t = self.times(assistant, x0, generator)
        eps = sent(normal(generator, len(x0), x0.shape[1:]), x0)
        prediction = noise_of(assistant, add_noise(assistant, x0, eps, t), t, cond)
        return (prediction - eps).square().flatten(1).mean(1)


def noise_of(denoiser: Denoiser, x_t: Tensor, t: Float[Tensor, " B"], cond: Cond) -> Tensor:
    """Return a denoiser's estimate of the noise in ``x_t``, (B, *d), for any target."""
    if torch.is_grad_enabled():
        # Calls without gradient leave detached casts of weights in autocast's cache.
        torch.clear_autocast_cache()
    return at_least_float32(estimates_of(denoiser, denoiser(x_t, t, cond), x_t, t)[1])
