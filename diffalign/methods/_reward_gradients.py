"""What methods of reward gradients share: sampling inside the graph, and the penalty that holds the policy.

A batch is noise (B, *d) with the sampler's ``grid`` and ``kernel`` and a differentiable reward, ``value``.
The method samples with the policy and gives the gradient of the reward of what comes out.
"""

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


@dataclass(frozen=True)
class Differentiating(RolloutMethod):
    """A method that learns from the gradient of a reward of what it samples itself.

    Attributes:
        eta: noise of the sampling that it needs, as ``rollout.eta`` has it.
    """

    eta: ClassVar[float] = 0.0

    @property
    def words(self) -> bool:
        """Whether it asks for rewards under words before the prompt."""
        return False


@dataclass(frozen=True, kw_only=True)
class RewardGradient(Differentiating):
    """A method that differentiates a reward through its own sampling.

    Attributes:
        hold: weight of the squared difference between the predictions of policy and reference at the steps
            that carry gradient, in units of the reward. The guard against over-optimisation; 0: none, and no
            reference is called.
    """

    hold: float = 1.0

    def __post_init__(self) -> None:
        if self.hold < 0:
            raise UserError(f"method.hold={self.hold}; allowed: 0 or more")

    @property
    def needs_reference(self) -> bool:
        """Whether the penalty asks the reference."""
        return self.hold > 0


def guided(denoiser: Denoiser, batch: Batch[Tensor]) -> Denoiser:
    """Return the denoiser under the guidance that the batch is sampled with."""
    return denoiser if batch.guidance == 1 else Guided(denoiser, batch.negative, batch.guidance)


class Unrolled:
    """One sampling of a batch by the policy, from time 1 to 0, whose steps carry gradient where it is wanted.

    Attributes:
        states: x_t before each step, detached, (T, B, *d) as a list.
        held: (B,) sums over the steps with gradient of the squared difference to the reference's predictions.
    """

    def __init__(self, policy: Denoiser, reference: Denoiser | None, batch: Batch[Tensor]):
        """Hold a batch; ``reference`` None: no penalty is summed."""
        if batch.grid is None:
            raise ValueError("a batch that the policy samples itself needs its grid")
        self._batch = batch
        self._policy = guided(policy, batch)
        self._reference = None if reference is None else guided(reference, batch)
        self._kernel = batch.kernel if isinstance(batch.kernel, StepKernel) else DDIM()
        self.times = batch.grid
        self.states: list[Tensor] = []
        self.held = torch.zeros(len(batch.x), device=batch.x.device)

    @property
    def steps(self) -> int:
        """T, the number of sampling steps."""
        return len(self.times) - 1

    def run(self, carries: Bool[Tensor, "T B"]) -> Tensor:
        """Sample to the end; return the clean latents (B, *d).

        Args:
            carries: which steps of which samples carry gradient. The latents that enter a sample's first such
                step are constants; a step that does not carry gradient passes none on.
        """
        x = self._batch.x
        for step in range(self.steps):
            self.states.append(x.detach())
            with torch.set_grad_enabled(bool(carries[step].any())):
                after, distance = self.step(x, step)
            if bool(carries[step].any()):
                self.held = self.held + distance * carries[step]
                after = torch.where(expand(carries[step], after), after, after.detach())
            x = after
        return x

    def step(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the mean of the sampler's step from a state (B, *d), and ``predicted``'s distance, (B,)."""
        t, s = (self.times[step + i].to(x).expand(len(x)) for i in (0, 1))
        clean, noise, distance = self.predicted(x, t)
        return self._kernel.after(self._policy.path, clean, noise, t, s)[0], distance

    def predicted(self, x: Tensor, t: Float[Tensor, " B"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the policy's estimates of the clean latents and the noise of states (B, *d), each at its own
        time, and the mean squared difference of its predictions to the reference's, (B,), 0 without gradient
        or reference.
        """
        if torch.is_grad_enabled():
            # Steps without gradient leave casts of weights in autocast's cache, which would cut the graph.
            torch.clear_autocast_cache()
        prediction = self._policy(x, t, self._batch.cond)
        clean, noise = estimates_of(self._policy, prediction, x, t)
        if self._reference is None or not torch.is_grad_enabled():
            return clean, noise, torch.zeros(len(x), device=x.device)
        with torch.no_grad():
            reference = self._reference(x, t, self._batch.cond)
        return clean, noise, at_least_float32(prediction - reference).square().flatten(1).mean(1)


def gradient_step(rewards: Tensor, loss: Tensor, held: Tensor, hold: float) -> Step:
    """Return the step of B samples.

    Args:
        rewards: (B,), for the log.
        loss: (B,), what is minimised of each.
        held: (B,) penalties.
        hold: their weight.
    """
    whole = at_least_float32(loss) + hold * held
    metrics = {"reward": rewards.detach().float().mean(), "held": held.detach().mean()}
    return Step(whole.mean(), metrics, torch.tensor(float(len(loss)), device=loss.device))
