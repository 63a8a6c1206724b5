"""Adjoint Matching. Domingo-Enrich et al. 2024, "Adjoint Matching: Fine-tuning Flow and Diffusion Generative
Models with Memoryless Stochastic Optimal Control", arXiv 2409.08861.

The target is p(x) ~ p_reference(x) exp(r(x) / beta). The policy samples x_0, ..., x_T (here from noise to
data) by steps of the memoryless noise schedule, without gradient. The lean adjoint is computed backwards
through the reference's steps, by vector-Jacobian products of their means,

    a_T = -grad r(x_T) / beta,    a_k = (d mean_reference(x_k) / dx)^T a_{k+1},

and with all but the policy's mean constant, summed over the latent elements,

    loss = mean over chosen k of | (mean_policy(x_k) - mean_reference(x_k)) / std_k + std_k a_k |^2.

At the optimum the policy's control is -std a. beta is one over the paper's lambda. The memoryless schedule is
the path's Markov chain (``samplers.Ancestral``): DDIM with eta 1, or the posterior steps of a flow.

Steps with unusually large losses are left out: those whose root is not below a running mean of the
``quantile`` of the batches' roots. Guidance applies to the sampling only, as released: policy and reference
are matched without guidance, which gave the authors the best results but is not covered by the theory.

Differences from the released code (microsoft/soc-fine-tuning-sd): the steps are drawn for each sample, not
for the batch; with several processes the mean of their quantiles is used; there is no smoothing of the
reward's gradient and no buffer; a step without noise (the last one of a flow) is not chosen. On flows the
paper makes Euler-Maruyama steps with an offset in the schedule, which is infinite at pure noise; posterior
steps need no offset.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffalign.diffusion.likelihood import at_least_float32
from diffalign.diffusion.noising import expand
from diffalign.diffusion.randomness import normal, uniform
from diffalign.diffusion.samplers import Ancestral, estimates_of
from diffalign.errors import UserError
from diffalign.methods._base import check_positive
from diffalign.methods._reward_gradients import Differentiating, guided
from diffalign.methods.registry import DataKind, MethodCard
from diffalign.types import Batch, Cond, Denoiser, Random, Step
from diffalign.utils.distributed import mean_over_ranks
from diffalign.utils.transfer import sent

KERNEL = Ancestral()


class Threshold:
    """Running mean of a quantile, a float64 scalar; NaN before the first update."""

    def __init__(self) -> None:
        self.value = torch.full((), torch.nan, dtype=torch.float64)

    def update(self, roots: Tensor, quantile: float, decay: float) -> Tensor:
        """Update with the roots (N,) of a batch on all processes (a collective); return the running mean."""
        new = mean_over_ranks(roots.float().quantile(quantile)[None]).double()
        old = self.value.to(new.device)
        self.value = torch.where(old.isnan(), new, decay * old + (1 - decay) * new)
        return self.value


@dataclass(frozen=True)
class AdjointMatching(Differentiating):
    """Regress the policy's control onto the lean adjoint of the reference.

    Attributes:
        beta: weight of the KL to the reference, above 0: the target is p_reference exp(r / beta).
        trained: number of sampling steps of each sample in the loss, at least 1.
        early: share of the steps, from noise on, from which the first half of them is drawn, in [0, 1]; the
            other half is drawn from the later steps.
        quantile: quantile of a batch's roots above which steps are left out, in (0, 1]; 1: none is.
        decay: decay of the quantile's running mean, in [0, 1).
        threshold: running mean of the quantile; copies made by ``dataclasses.replace`` share it.
    """

    beta: float = 0.01
    trained: int = 4
    early: float = 0.6
    quantile: float = 0.9
    decay: float = 0.9
    threshold: Threshold = field(default_factory=Threshold, repr=False, compare=False)

    eta: ClassVar[float] = 1.0
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, "beta", "quantile")
        if self.trained < 1:
            raise UserError(f"method.trained={self.trained}; allowed: 1 or more")
        if not 0 <= self.early <= 1:
            raise UserError(f"method.early={self.early}; allowed: 0 to 1")
        if self.quantile > 1:
            raise UserError(f"method.quantile={self.quantile}; allowed: more than 0, up to 1")
        if not 0 <= self.decay < 1:
            raise UserError(f"method.decay={self.decay}; allowed: 0 or more, less than 1")

    def __call__(
        self, policy: Denoiser, reference: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator
    ) -> Step:
        """Return the mean loss over the chosen steps of B samples from noise ``batch.x`` (B, *d).

        With ``quantile`` below 1 it is a collective operation.
        """
        if batch.grid is None or batch.value is None:
            raise ValueError("a batch of a reward gradient needs its grid and its value")
        states = sampled(guided(policy, batch), batch, generator)
        end = states[-1].requires_grad_()
        reward = batch.value(end, torch.arange(len(end), device=end.device))
        (to_end,) = torch.autograd.grad(reward.sum(), end)
        adjoint = lean_adjoint(reference, states, batch.grid, batch.cond, -to_end / self.beta)
        chosen = self.chosen(adjoint.stds > 0, batch.num_groups, generator)[batch.group]
        losses, control = matching_losses(policy, states, batch.grid, batch.cond, adjoint, chosen)
        roots = losses.detach().sqrt()
        keep = torch.ones_like(roots)
        if self.quantile < 1:
            keep = (roots < self.threshold.update(roots.flatten(), self.quantile, self.decay)).to(roots)
        metrics = {
            "reward": reward.detach().float().mean(),
            "control": control.detach().mean(),
            "kept": keep.mean(),
        }
        weight = end.new_full((), len(end), dtype=torch.float32)
        return Step((keep * losses).mean(), metrics, weight)

    def chosen(
        self, noisy: Tensor, groups: int, generator: Random | torch.Generator
    ) -> Int[Tensor, "groups M"]:
        """Return the indices of each group's steps in the loss, without repetition.

        Args:
            noisy: (T,) mask of the steps with noise.
            groups: number of groups.
            generator: source of the draws.
        """
        steps = noisy.nonzero()[:, 0].cpu()
        first = math.ceil(self.early * len(steps))
        early_count = min(self.trained // 2, first)
        late_count = min(self.trained - early_count, len(steps) - first)
        # the early part supplies what the late part lacks
        early_count = min(self.trained - late_count, first)
        order = uniform(generator, groups, (len(steps),)).cpu()
        places = [
            order[:, :first].argsort(1)[:, :early_count],
            first + order[:, first:].argsort(1)[:, :late_count],
        ]
        return steps[torch.cat(places, 1)]

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean; empty before the first update."""
        return {} if self.threshold.value.isnan() else {"threshold": self.threshold.value.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from the result of ``state_dict``."""
        if "threshold" in state:
            self.threshold.value = torch.tensor(state["threshold"], dtype=torch.float64)


class LeanAdjoint(NamedTuple):
    """Lean adjoints a_0 .. a_T and the reference's means of T steps, each (B, *d), and their stds (T,)."""

    adjoints: list[Tensor]
    means: list[Tensor]
    stds: Tensor


@torch.no_grad()
def sampled(policy: Denoiser, batch: Batch[Tensor], generator: Random | torch.Generator) -> list[Tensor]:
    """Return the states x_0 .. x_T of memoryless steps from ``batch.x``, each (B, *d)."""
    assert batch.grid is not None
    x = at_least_float32(batch.x)
    states = [x]
    for step in range(len(batch.grid) - 1):
        t, s = times_of(batch.grid, step, x)
        mean, std = KERNEL(policy, x, t, s, batch.cond)
        noise = sent(normal(generator, batch.num_groups, x.shape[1:])[batch.group], x)
        x = mean + std * noise
        states.append(x)
    return states


def lean_adjoint(
    reference: Denoiser, states: list[Tensor], times: Float[Tensor, " S"], cond: Cond, terminal: Tensor
) -> LeanAdjoint:
    """Return the lean adjoint with a_T = ``terminal`` (B, *d) through the reference's steps at ``states``."""
    adjoints = [terminal]
    means: list[Tensor] = []
    stds: list[Tensor] = []
    for step in reversed(range(len(states) - 1)):
        with torch.enable_grad():
            x = states[step].detach().requires_grad_()
            t, s = times_of(times, step, x)
            mean, std = KERNEL(reference, x, t, s, cond)
            # the product is linear in the adjoint: scaled to size 1 it fits half precision
            size = adjoints[0].abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
            (a,) = torch.autograd.grad(mean, x, (adjoints[0] / size).to(mean))
        adjoints.insert(0, a * size)
        means.insert(0, mean.detach())
        stds.insert(0, std.flatten()[0])
    return LeanAdjoint(adjoints, means, torch.stack(stds))


def matching_losses(
    policy: Denoiser,
    states: list[Tensor],
    times: Float[Tensor, " S"],
    cond: Cond,
    adjoint: LeanAdjoint,
    chosen: Int[Tensor, "B M"],
) -> tuple[Tensor, Tensor]:
    """Return the losses (B, M) at the chosen steps, and half the squared control (B, M), the KL of each step.

    The policy is called once, on B M samples.
    """
    count = chosen.shape[1]
    rows = torch.arange(len(chosen)).repeat_interleave(count)
    steps = chosen.flatten().cpu()

    def at(tensors: list[Tensor]) -> Tensor:
        return torch.stack([tensors[k][i] for k, i in zip(steps.tolist(), rows.tolist(), strict=True)])

    x, mean, a = at(states), at(adjoint.means), at(adjoint.adjoints)
    t, s = (sent(times[steps + i], x) for i in (0, 1))
    row_cond = {name: value[sent(rows, value.device)] for name, value in cond.items()}
    std = expand(adjoint.stds[sent(steps, adjoint.stds.device)], x)
    clean, noise = estimates_of(policy, policy(x, t, row_cond), x, t)
    # |(mean_policy - mean_reference) / std + std a|^2, summed over the latent elements
    control = (KERNEL.after(policy.path, clean, noise, t, s)[0] - mean) / std
    loss = (control + std * a).square().flatten(1).sum(1)
    return loss.reshape(-1, count), control.square().flatten(1).sum(1).reshape(-1, count) / 2


def times_of(times: Float[Tensor, " S"], step: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times (B,) before and after a step."""
    t, s = (sent(times[step + i], like).expand(len(like)) for i in (0, 1))
    return t, s


CARD = MethodCard(
    name="adjoint_matching",
    title="Adjoint Matching",
    paper="Domingo-Enrich et al., Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with "
    "Memoryless Stochastic Optimal Control",
    year=2024,
    arxiv="2409.08861",
    data=DataKind.DIFFERENTIABLE,
    cost="a sample: 4 policy predictions with gradient; all steps by the policy without gradient, and by the "
    "reference with gradient to the state",
    method=AdjointMatching,
    rollout="gradients",
)
