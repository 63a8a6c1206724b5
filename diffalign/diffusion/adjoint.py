"""The probability-flow ODE as a differentiable sampler, with gradients by the adjoint ODE.

Pan et al. 2023, AdjointDPM, arXiv 2307.10711. The ODE of a diffusion model is semi-linear; with its linear
part solved exactly (the exponential integrator), y = x / alpha and rho = sigma / alpha, it is

    dy/drho = eps( alpha y, t(rho), c ).

A rectified flow has no linear part in x: dx/dt = v(x, t, c). Both are dy/dtau = F here, and an Euler step is
the deterministic DDIM step. With a = dL/dy and no running cost, backwards from the end,

    da/dtau = -a^T dF/dy,    dL/dc = -int a^T dF/dc dtau,    dL/dtheta = -int a^T dF/dtheta dtau,

with tau falling from noise to data. ``backward`` selects the states at which the right sides are evaluated:

    integrated   y is integrated backwards together with a; only the last state is stored (the paper)
    kept         the states of the forward solve, which are stored (the released code)
    exact        the derivative of each solver step at its stored state, equal to backpropagation

All three need the activations of one network call at a time (of two for ``heun`` with ``exact``). The first
two are the adjoint of the ODE, not of the solver: they differ from backpropagation by the solver's error.
``heun`` (the explicit trapezoid) evaluates at times of the grid only, so that no time lies between two rows
of the table that the network was trained with.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.samplers import estimates_of
from diffalign.errors import UserError
from diffalign.types import Cond, Denoiser
from diffalign.utils.transfer import sent

Solver = Literal["euler", "heun"]
Backward = Literal["integrated", "kept", "exact"]
Cost = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, *d), t (B,), prediction (B, *d)) -> (B,): a running cost that is summed over the steps."""

LEAST_SIGNAL = 1e-4
"""Alpha below which rho = sigma / alpha is treated as infinite."""


def probability_flow(
    denoiser: Denoiser,
    x: Float[Tensor, " B *d"],
    times: Float[Tensor, " S"],
    cond: Cond,
    *,
    solver: Solver = "euler",
    backward: Backward = "integrated",
    cost: Cost | None = None,
) -> tuple[Float[Tensor, " B *d"], Float[Tensor, " B"]]:
    """Return the latents at the last time, solved from ``x``, and the cost summed over the steps (0 if None).

    Both have gradients to ``x``, to every tensor of ``cond`` that requires one, and to all parameters that
    the denoiser's prediction depends on (found from the graph of the first step's call).

    Args:
        denoiser: the network, with its guidance.
        x: latents at ``times[0]``.
        times: (T + 1,) descending times.
        cond: conditions, every tensor (B, ...).
        solver: "euler", one call per step, or "heun", two.
        backward: states of the backward pass, see the module.
        cost: running cost of each state.

    Raises:
        UserError: the path has no signal at ``times[0]``, or a flow's network does not predict the velocity.
        ValueError: the network uses reentrant gradient checkpointing, which hides its parameters.
    """
    flow = _Flow(denoiser, times, cond, solver, backward, cost)
    if not torch.is_grad_enabled():
        y, total = flow.solve(x)
        return y * flow.scales[-1], total
    wanted = [name for name, value in cond.items() if value.requires_grad]
    copies = {name: cond[name].detach().requires_grad_() for name in wanted}
    y = flow.start(x).requires_grad_()
    first = flow.rate(y, 0, copies)
    inputs = {id(tensor) for tensor in (y, *copies.values())}
    leaves = [leaf for leaf in leaves_of(*first) if id(leaf) not in inputs]
    flow.first = tuple(value.detach() for value in first)
    flow.wanted = wanted
    end, total = _Solve.apply(flow, len(wanted), x, *(cond[name] for name in wanted), *leaves)
    return end, total


class _Flow:
    """The ODE dy/dtau = F on a grid of times.

    Attributes:
        scales: T + 1 factors m with x = m y.
        clock: T + 1 values of tau.
        states: y before each step, T tensors (B, *d); empty if y is integrated backwards.
        first: rate and cost of the first call, if already computed.
        wanted: names of the conditions that require a gradient.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        times: Tensor,
        cond: Cond,
        solver: Solver,
        backward: Backward,
        cost: Cost | None,
    ):
        self.denoiser, self.times, self.cond = denoiser, times, cond
        self.solver, self.backward, self.cost = solver, backward, cost
        alpha, sigma = denoiser.path.coefficients(times.double())
        self.velocity = isinstance(denoiser.path, RectifiedFlow)
        if self.velocity and denoiser.target != "flow":
            raise UserError(
                f"the probability flow of a rectified flow whose network predicts {denoiser.target!r}; "
                "allowed: 'flow', the velocity"
            )
        if not self.velocity and float(alpha[0]) < LEAST_SIGNAL:
            raise UserError(
                f"the adjoint of a path without signal at the first sampling time, {float(times[0]):g} "
                f"(alpha {float(alpha[0]):.2g}): rho = sigma / alpha has no bound; allowed: schedules whose "
                "last step holds signal (no zero terminal SNR, or leading spacing), flows, or method draft"
            )
        ones = torch.ones_like(alpha)
        self.scales: list[float] = (ones if self.velocity else alpha).tolist()
        self.clock: list[float] = (times.double() if self.velocity else sigma / alpha).tolist()
        self.states: list[Tensor] = []
        self.first: tuple[Tensor, ...] | None = None
        self.wanted: Sequence[str] = ()

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.clock) - 1

    def length(self, step: int) -> float:
        """Return the change of tau in a step, below 0."""
        return self.clock[step + 1] - self.clock[step]

    def start(self, x: Tensor) -> Tensor:
        """Return y of the first state, detached."""
        return at_least_float32(x.detach()) / self.scales[0]

    def rate(self, y: Tensor, index: int, conditions: Cond | None = None) -> tuple[Tensor, ...]:
        """Return F (B, *d), and the cost (B,) if there is one, at a grid point.

        Args:
            y: the state, (B, *d).
            index: index of the grid point, 0 to T.
            conditions: replacements of conditions, by name.
        """
        if torch.is_grad_enabled():
            # Calls without gradient leave detached casts of weights in autocast's cache.
            torch.clear_autocast_cache()
        x = y * self.scales[index]
        t = sent(self.times[index], x).expand(len(x))
        prediction = self.denoiser(x, t, {**self.cond, **(conditions or {})})
        rate = prediction if self.velocity else estimates_of(self.denoiser, prediction, x, t)[1]
        rate = at_least_float32(rate)
        return (rate,) if self.cost is None else (rate, self.cost(x, t, prediction))

    def step(self, y: Tensor, step: int, conditions: Cond | None = None) -> tuple[Tensor, ...]:
        """Return the state after a solver step, and the step's cost if there is one."""
        length, first, self.first = self.length(step), self.first, None
        before = first if first is not None else self.rate(y, step, conditions)
        if self.solver == "euler":
            return (y + length * before[0], *before[1:])
        after = self.rate(y + length * before[0], step + 1, conditions)
        means = [(first + second) / 2 for first, second in zip(before, after, strict=True)]
        return (y + length * means[0], *means[1:])

    @torch.no_grad()
    def solve(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last y and the summed cost (B,); store the states that the backward pass needs."""
        y, total = self.start(x), torch.zeros(len(x), device=x.device)
        for step in range(self.steps):
            if self.backward != "integrated":
                self.states.append(y)
            y, *cost = self.step(y, step)
            total = total + sum(cost)
        return y, total

    def solve_adjoint(
        self, y: Tensor, a: Tensor, weight: Tensor, leaves: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Solve the adjoint ODE; return the gradients to the first y, the wanted conditions and the leaves.

        Args:
            y: the last state, (B, *d).
            a: gradient to it, (B, *d).
            weight: (B,) gradient to the summed cost.
            leaves: the parameters.
        """
        sums = _Sums(len(self.wanted) + len(leaves))
        # da/dtau = -a^T dF/dy, from the last state to the first: a grows by length * a^T dF/dy in each step
        for step in reversed(range(self.steps)):
            length = self.length(step)
            if self.backward == "exact":
                y = self.states.pop()
                _, a, gradients = self._vjp(self.step, y, step, a, weight, leaves)
                sums.add(gradients)
                continue
            rate, product, gradients = self._rate_vjp(y, step + 1, length * a, weight, leaves)
            if self.solver == "euler":
                before, a = y - length * rate, a + product
            else:
                second = self._rate_vjp(
                    y - length * rate, step, length * (a + product), weight, leaves, share=0.5
                )
                before, a = y - length * (rate + second[0]) / 2, a + product / 2 + second[1]
                gradients = [value if value is None else value / 2 for value in gradients]
                sums.add(second[2])
            sums.add(gradients)
            y = self.states.pop() if self.states else before
        return [a, *sums.values]

    def _rate_vjp(
        self, y: Tensor, index: int, a: Tensor, weight: Tensor, leaves: Sequence[Tensor], share: float = 1.0
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return F at (y, index), and ``share`` times the vector-Jacobian products of F and the cost."""
        return self._vjp(self.rate, y, index, share * a, share * weight, leaves)

    def _vjp(
        self,
        function: Callable[[Tensor, int, Cond], tuple[Tensor, ...]],
        y: Tensor,
        index: int,
        a: Tensor,
        weight: Tensor,
        leaves: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Return the first output of ``function`` at y, and its vector-Jacobian products with (a, weight).

        The products are those to y, to the wanted conditions and to the leaves.
        """
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            copies = {name: self.cond[name].detach().requires_grad_() for name in self.wanted}
            outputs = function(y, index, copies)
            cotangents = (a, weight.to(outputs[-1]))[: len(outputs)]
            to_y, *gradients = torch.autograd.grad(
                outputs, (y, *copies.values(), *leaves), cotangents, allow_unused=True
            )
        # the gradient to y is None if the function does not depend on the state
        return outputs[0].detach(), torch.zeros_like(y) if to_y is None else to_y, [*gradients]


class _Sums:
    """Running sums of gradients; None for a sum without terms."""

    def __init__(self, count: int):
        self.values: list[Tensor | None] = [None] * count

    def add(self, terms: Sequence[Tensor | None]) -> None:
        """Add a term to each sum."""
        for i, term in enumerate(terms):
            total = self.values[i]
            if term is not None:
                self.values[i] = term if total is None else total.add_(term)


class _Solve(torch.autograd.Function):
    """Autograd function of the solution, whose backward pass is the adjoint ODE."""

    @staticmethod
    def forward(ctx: Any, flow: _Flow, conditions: int, x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last latents, shaped like x, and the summed cost (B,)."""
        y, total = flow.solve(x)
        ctx.flow, ctx.leaves, ctx.dtype = flow, inputs[conditions:], x.dtype
        ctx.save_for_backward(y)
        return y * flow.scales[-1], total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients to x, the conditions and the parameters."""
        to_end, weight = cotangents
        flow: _Flow = ctx.flow
        (y,) = ctx.saved_tensors
        to_y, *gradients = flow.solve_adjoint(y, to_end * flow.scales[-1], weight, ctx.leaves)
        assert to_y is not None
        return None, None, (to_y / flow.scales[0]).to(ctx.dtype), *gradients


def leaves_of(*outputs: Tensor) -> list[Tensor]:
    """Return the leaf tensors of the graph of ``outputs``, each once.

    Raises:
        ValueError: the graph has a reentrant checkpoint, behind which leaves are hidden.
    """
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    visited: set[Any] = set(stack)
    leaves: list[Tensor] = []
    while stack:
        node = stack.pop()
        if node.name() == "CheckpointFunctionBackward":
            raise ValueError("reentrant gradient checkpointing hides parameters; use_reentrant must be False")
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for after, _ in node.next_functions:
            if after is not None and after not in visited:
                visited.add(after)
                stack.append(after)
    return leaves
