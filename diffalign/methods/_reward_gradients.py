"""Functions that methods of reward gradients share: differentiable sampling, and a penalty.

A batch holds noise (B, *d), the sampler's ``grid`` and ``kernel``, and a differentiable reward ``value``. The
method samples with the policy and maximises the reward of the samples by its gradient.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import expand
from diffalign.diffusion.samplers import DDIM, StepKernel, estimates_of
from diffalign.errors import UserError
from diffalign.methods._base import RolloutMethod
from diffalign.types import Batch, Denoiser, Step
from diffalign.utils.transfer import sent


@dataclass(frozen=True)
class Differentiating(RolloutMethod):
    """A method that samples itself and uses the gradient of the reward of its samples.

    Attributes:
        eta: noise of the sampling that it needs, as in ``rollout.eta``.
    """

    eta: ClassVar[float] = 0.0

    @property
    def words(self) -> bool:
        """Whether it evaluates rewards of prompts with a word in front."""
        return False

    @property
    def saturation(self) -> float:
        """Reward from which on a sample has no gradient; infinite if there is none."""
        return math.inf


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Differentiating):
    """A method that backpropagates a reward through its own sampling.

    Attributes:
        hold: weight, in units of the reward, of the mean squared difference between the predictions of policy
            and reference at the steps with gradient; at least 0. It limits over-optimisation of the reward;
            at 0 the reference is not called.
    """

    hold: float = 1.0

    def __post_init__(self) -> None:
        if self.hold < 0:
            raise UserError(f"method.hold={self.hold}; allowed: 0 or more")

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has the penalty, which calls the reference."""
        return self.hold > 0


def guided(denoiser: Denoiser, batch: Batch[Tensor]) -> Denoiser:
    """Return the denoiser with the guidance of the batch's sampling."""
    return denoiser if batch.guidance == 1 else Guided(denoiser, batch.negative, batch.guidance)


class Unrolled:
    """One sampling of a batch by the policy along its grid, with gradient through chosen steps.

    Attributes:
        states: x_t before each step, detached: T tensors (B, *d).
        penalty: (B,) sums, over the steps with gradient, of the mean squared difference to the reference's
            predictions.
    """

    def __init__(self, policy: Denoiser, reference: Denoiser | None, batch: Batch[Tensor]):
        """Prepare the sampling; without a ``reference`` the penalty stays 0."""
        if batch.grid is None:
            raise ValueError("a batch that the method samples itself needs a grid")
        self._batch = batch
        self._policy = guided(policy, batch)
        self._reference = None if reference is None else guided(reference, batch)
        self._kernel = batch.kernel if isinstance(batch.kernel, StepKernel) else DDIM()
        self.times = batch.grid
        self.states: list[Tensor] = []
        self.penalty = torch.zeros(len(batch.x), device=batch.x.device)

    @property
    def steps(self) -> int:
        """T, the number of sampling steps."""
        return len(self.times) - 1

    def run(self, carries: Bool[Tensor, "T B"]) -> Tensor:
        """Sample to the last time; return the clean latents (B, *d).

        Args:
            carries: mask of the steps with gradient of each sample, on the CPU. The latents before a sample's
                first such step are constants; a step outside the mask stops the gradient.
        """
        x, some = self._batch.x, carries.any(1).tolist()
        on_device = sent(carries, x.device)
        for step in range(self.steps):
            self.states.append(x.detach())
            with torch.set_grad_enabled(some[step]):
                after, distance = self.step(x, step)
            if some[step]:
                self.penalty = self.penalty + distance * on_device[step]
                after = torch.where(expand(on_device[step], after), after, after.detach())
            x = after
        return x

    def step(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean of the sampler's step from a state (B, *d), and ``predicted``'s distance (B,)."""
        t, s = (sent(self.times[step + i], x).expand(len(x)) for i in (0, 1))
        clean, noise, distance = self.predicted(x, t)
        return self._kernel.after(self._policy.path, clean, noise, t, s)[0], distance

    def predicted(self, x: Tensor, t: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's estimates of clean latents and noise for states (B, *d) at times (B,).

        The third result is the mean squared difference (B,) of its predictions to the reference's; 0 without
        gradient or without reference.
        """
        if torch.is_grad_enabled():
            # Steps without gradient leave detached casts of weights in autocast's cache.
            torch.clear_autocast_cache()
        prediction = self._policy(x, t, self._batch.cond)
        clean, noise = estimates_of(self._policy, prediction, x, t)
        if self._reference is None or not torch.is_grad_enabled():
            return clean, noise, torch.zeros(len(x), device=x.device)
        with torch.no_grad():
            reference = self._reference(x, t, self._batch.cond)
        return clean, noise, at_least_float32(prediction - reference).square().flatten(1).mean(1)


def gradient_step(
    rewards: Tensor, loss: Tensor, penalty: Tensor, hold: float, past: Tensor | None = None
) -> Step:
    """Return the step of B samples with loss plus penalty.

    Args:
        rewards: (B,) rewards, for the metrics.
        loss: (B,) losses.
        penalty: (B,) penalties to the reference.
        hold: weight of the penalties.
        past: (B,) shares of each sample's losses that are past a margin, and so have no gradient.
    """
    total = at_least_float32(loss) + hold * penalty
    metrics = {"reward": rewards.detach().float().mean(), "held": penalty.detach().mean()}
    if past is not None:
        metrics["past_margin"] = past.detach().float().mean()
    return Step(total.mean(), metrics, loss.new_full((), len(loss), dtype=torch.float32))
