"""AdjointDPM. Pan et al. 2023, "AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of
Diffusion Probabilistic Models", arXiv 2307.10711.

The reward r of the solution of the policy's probability-flow ODE is maximised by its gradient, which the
adjoint ODE computes in constant memory (``diffusion.adjoint``):

    loss = -r( x_0(theta) ),    dL/dtheta = -int a^T d eps/dtheta drho,    da/drho = -a^T d eps/dy,

in y = x / alpha and rho = sigma / alpha, where the linear part of the ODE is integrated exactly; on a flow in
x and t. All steps have gradient, as in DRaFT with ``last: null``, and the activations of one network call are
in memory at a time. ``backward`` selects the states of the adjoint: ``integrated`` (the paper) stores none,
``kept`` (the released code) stores those of the forward solve, ``exact`` differentiates the steps of the
solver and equals DRaFT's gradient. The first two differ from it by the solver's error.

Differences from the released code (HanshuYAN/AdjointDPM): it optimises the initial noise or the text
embedding of one image and leaves the weights, which the paper describes, to the reader; here the weights are
trained over prompts (``diffusion.adjoint.probability_flow`` gives gradients to noise and conditions as well).
It decodes y where x = alpha y is meant. Its midpoint stages take the nearest time of the grid; our
second-order solver, ``heun``, has its stages on the grid. The loss has a penalty on the distance to the
reference (``hold``).
"""

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from diffalign.diffusion.adjoint import Backward, Cost, Solver, probability_flow
from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError, unknown
from diffalign.methods._reward_gradients import RewardGradient, gradient_step, guided
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Denoiser, Random, Step


@dataclass(frozen=True)
class AdjointDPM(RewardGradient):
    """Maximise the reward of the probability-flow ODE's solution by the adjoint ODE.

    Attributes:
        solver: "euler", the DDIM step, or "heun", of second order with two network calls a step.
        backward: "integrated", "kept" or "exact", see the module.
    """

    solver: Solver = "euler"
    backward: Backward = "integrated"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("solver", Solver), ("backward", Backward)):
            if getattr(self, name) not in get_args(allowed):
                raise unknown(f"method.{name}", getattr(self, name), get_args(allowed))

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the step whose loss is minus the mean reward of B samples from noise ``batch.x`` (B, *d).

        Raises:
            UserError: the run's sampler is stochastic.
        """
        if batch.grid is None or batch.value is None:
            raise ValueError("a batch of a reward gradient needs its grid and its value")
        if batch.kernel is not None and batch.kernel != DDIM():
            raise UserError(
                f"method adjoint_dpm with sampler {batch.kernel}: it solves an ODE; allowed: rollout.eta 0"
            )
        x0, penalty = probability_flow(
            guided(policy, batch),
            batch.x,
            batch.grid,
            batch.cond,
            solver=self.solver,
            backward=self.backward,
            cost=distance_to(guided(reference, batch), batch) if self.hold else None,
        )
        reward = batch.value(x0, torch.arange(len(x0), device=x0.device))
        return gradient_step(reward, -reward, penalty, self.hold)


def distance_to(reference: Denoiser, batch: Batch[Tensor]) -> Cost:
    """Return the cost: the mean squared difference (B,) of a prediction to the reference's."""

    def distance(x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        with torch.no_grad():
            target = reference(x, t, batch.cond)
        return at_least_float32(prediction - target).square().flatten(1).mean(1)

    return distance


CARD = MethodCard(
    name="adjoint_dpm",
    title="AdjointDPM",
    paper="Pan et al., AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion "
    "Probabilistic Models",
    year=2023,
    arxiv="2307.10711",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: all policy steps twice, once with gradient, and as many reference samples; activations "
    "of one step",
    method=AdjointDPM,
    rollout="gradients",
)
