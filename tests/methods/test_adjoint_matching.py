"""Adjoint Matching: golden vectors of the released trainer, the optimum of Gaussian data in closed form, and
the memoryless steps of a flow against its SDE.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, Ancestral, FlowSDE
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.adjoint_matching import AdjointMatching, lean_adjoint, matching_losses, sampled
from diffalign.models.denoisers import AdaptersOff, NetworkDenoiser
from diffalign.types import Batch
from tests.helpers import VECTORS, sd_path

GOLDEN = np.load(VECTORS / "adjoint_matching_a.npz")
VP = VariancePreserving(sd_path().alphas_cumprod.double())
FLOW = RectifiedFlow()


@dataclass(frozen=True)
class Tabled:
    """A variance-preserving path known at some times only."""

    times: torch.Tensor
    squared: torch.Tensor

    def coefficients(self, t):
        squared = self.squared[(t[:, None].double() - self.times).abs().argmin(1)]
        return squared.sqrt(), (1 - squared).sqrt()


@dataclass
class Toy:
    """The toy of the vectors: eps = tanh(flat(x) A)."""

    path: Tabled
    A: torch.Tensor
    target: str = "eps"

    def __call__(self, x, t, cond):
        return torch.tanh(x.flatten(1) @ self.A).reshape(x.shape)


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_adjoints_losses_and_gradient_of_the_released_trainer(name):
    at = lambda key: torch.from_numpy(GOLDEN[f"{name}_{key}"])  # noqa: E731
    times = torch.cat([at("timesteps"), torch.zeros(1)]).double() / 1000
    path = Tabled(times, torch.cat([at("alphas_cumprod_at_t"), at("alpha_prev")[-1:]]))
    torch.testing.assert_close(path.squared[1:], at("alpha_prev"))
    base, policy = Toy(path, at("eps_base_A")), Toy(path, at("eps_policy_A").requires_grad_())
    states = list(at("trajectory").unbind(1))
    adjoints = at("adjoint")
    back = lean_adjoint(base, states, times, {}, adjoints[:, -1])
    torch.testing.assert_close(torch.stack(back.adjoints, 1), adjoints, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(back.stds, at("std"), rtol=1e-9, atol=1e-12)
    every = torch.arange(len(times) - 1).expand(len(states[0]), -1)
    losses, kl = matching_losses(policy, states, times, {}, back, every)
    torch.testing.assert_close(losses, at("loss_per_step"), rtol=1e-9, atol=1e-9)
    control = at("control_sqrt_dt").square().flatten(2).sum(2) / 2
    torch.testing.assert_close(kl, control, rtol=1e-9, atol=1e-9)
    assert losses.mean().item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-10)
    losses.mean().backward()
    torch.testing.assert_close(policy.A.grad, at("grad_policy_A"), rtol=1e-8, atol=1e-6)


@dataclass
class Gaussian:
    """The exact network of data N(mean, std^2): eps or velocity of the posterior mean."""

    path: object
    mean: torch.Tensor
    std: float = 0.6

    @property
    def target(self):
        return "flow" if isinstance(self.path, RectifiedFlow) else "eps"

    def __call__(self, x, t, cond):
        alpha, sigma = (c[:, None] for c in self.path.coefficients(t))
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x0 = self.mean + gain * (x - alpha * self.mean)
        if self.target == "flow":
            return (x - alpha * x0) / sigma - x0
        return (x - alpha * x0) / sigma


def batch_of(path, steps, count=64):
    """Noise with the reward g x, whose tilt of a Gaussian by 1 / beta moves its mean by std^2 g / beta."""
    g = torch.tensor([0.5, -1.0], dtype=torch.float64)
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if path is FLOW:
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    else:
        rows = torch.linspace(999, 0, steps + 1, dtype=torch.float64).round()
        grid = rows / 1000
    return Batch(
        x, {}, torch.arange(count), torch.zeros(count), grid=grid, value=lambda latents, rows: latents @ g
    ), g


@pytest.mark.parametrize("path", [VP, FLOW])
def test_the_loss_is_nothing_at_the_tilted_optimum(path):
    """Of Gaussian data and a linear reward; at the reference it is |std a|^2, away from both it is more."""
    batch, g = batch_of(path, 200)
    method = AdjointMatching(beta=0.8, trained=40, quantile=1)
    base = Gaussian(path, torch.zeros(2, dtype=torch.float64))

    def loss(shift):
        policy = replace(base, mean=shift * base.std**2 * g / method.beta)
        return method(policy, base, batch, Streams.at(0, 0, 64)).loss.item()

    at_base, optimum, beyond = loss(0.0), loss(1.0), loss(2.0)
    assert optimum < (0.01 if path is FLOW else 0.08) * at_base  # of 200 steps; of endless ones 0
    assert 0.7 * at_base < beyond < 1.7 * at_base  # quadratic in the shift
    states = sampled(base, batch, Streams.at(0, 0, 64))
    back = lean_adjoint(base, states, batch.grid, {}, -g.expand(64, 2) / method.beta)
    noisy = back.stds > 0
    expected = torch.stack([(s * a).square().sum(1) for s, a in zip(back.stds, back.adjoints, strict=False)])
    assert at_base == pytest.approx(expected[noisy].mean().item(), rel=0.25)  # a fifth of the steps is drawn


def test_a_constant_of_the_reward_and_a_reward_of_nothing():
    batch, _ = batch_of(FLOW, 10)
    base = Gaussian(FLOW, torch.zeros(2, dtype=torch.float64))
    policy = replace(base, mean=torch.tensor([0.3, 0.1], dtype=torch.float64))
    method = AdjointMatching(quantile=1)
    value = batch.value
    raised = replace(batch, value=lambda latents, rows: value(latents, rows) + 7)
    none = replace(batch, value=lambda latents, rows: 0 * latents.sum(1))
    one, other, nothing = (method(policy, base, b, Streams.at(0, 0, 64)) for b in (batch, raised, none))
    assert one.loss.item() == pytest.approx(other.loss.item(), rel=1e-9)
    assert nothing.loss.item() == pytest.approx(2 * nothing.metrics["control"].item(), rel=1e-6)
    assert method(base, base, none, Streams.at(0, 0, 64)).loss.item() == 0


def test_memoryless_steps_are_ddims_and_near_the_flows_sde():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    t, s = torch.tensor([0.9] * 5, dtype=torch.float64), torch.tensor([0.6] * 5, dtype=torch.float64)
    for a, b in zip(Ancestral().after(VP, x0, eps, t, s), DDIM(1.0).after(VP, x0, eps, t, s), strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-9, atol=1e-9)
    # of a flow sigma(t)^2 = 2 t / (1 - t), Flow-GRPO's form at level sqrt(2); both differ by O(step)
    for length in (1e-2, 1e-3):
        s = t - length
        (mean, std), (sde, sde_std) = (
            kernel.after(FLOW, x0, eps, t, s) for kernel in (Ancestral(), FlowSDE(2**0.5))
        )
        here = (1 - t[:, None]) * x0 + t[:, None] * eps
        drift, expected = (mean - here) / length, (sde - here) / length
        assert float((drift - expected).abs().max()) < 300 * length
        assert float((std**2 / sde_std**2 - 1).abs().max()) < 20 * length
        assert float((std[0] ** 2 / length).item()) == pytest.approx(2 * 0.9 / 0.1, rel=20 * length)
    mean, std = Ancestral().after(FLOW, x0, eps, torch.ones(5, dtype=torch.float64), s)
    torch.testing.assert_close(mean, (1 - s[:, None]) * x0)  # a step from pure noise forgets it
    torch.testing.assert_close(std[:, 0], s)


def test_steps_are_drawn_half_and_half_without_repetition():
    method = AdjointMatching()
    noisy = torch.arange(50) < 49  # the last step of a flow has no noise
    chosen = method.chosen(noisy, 400, Streams.at(0, 0, 400))
    assert chosen.shape == (400, 4)
    assert int(chosen.max()) == 48
    early = chosen < 30  # ceil(0.6 49)
    assert (early.sum(1) == 2).all()
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    assert len(set(chosen.flatten().tolist())) == 49
    few = AdjointMatching(trained=9).chosen(torch.ones(5) > 0, 2, Streams.at(0, 0, 2))
    assert few.sort(1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_unusual_steps_are_left_out_and_the_bound_is_kept():
    batch, _ = batch_of(FLOW, 10)
    base = Gaussian(FLOW, torch.zeros(2, dtype=torch.float64))
    method = AdjointMatching(quantile=0.5)
    first = method(base, base, batch, Streams.at(0, 0, 64))
    assert first.metrics["kept"].item() == pytest.approx(0.5, abs=0.02)
    kept = method.state_dict()
    everything = AdjointMatching(quantile=1)(base, base, batch, Streams.at(0, 0, 64))
    assert 0 < first.loss < 0.5 * everything.loss
    again = AdjointMatching(quantile=0.5)
    assert again.state_dict() == {}
    again.load_state_dict(kept)
    assert again.threshold.value.item() == kept["threshold"]
    far = replace(batch, value=lambda latents, rows: 100 * latents.sum(1))
    assert again(base, base, far, Streams.at(0, 0, 64)).metrics["kept"] < 0.2


class Adapted(torch.nn.Module):
    """x W with a LoRA beside it, of peft."""

    def __init__(self):
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 2, bias=False)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False), self)

    def forward(self, x):
        return torch.tanh(self.layer(x))


def test_the_reference_under_adapters_has_a_gradient_to_its_input_only():
    network = Adapted()
    policy = NetworkDenoiser(network, VP, "eps", lambda net, x, time, cond: net(x))
    reference = AdaptersOff(policy, network)
    x, t = torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), torch.full((4,), 0.5)
    assert not reference(x, t, {}).requires_grad
    x.requires_grad_()
    weight = network.layer.base_layer.weight.detach()
    said = reference(x, t, {})
    torch.testing.assert_close(said, torch.tanh(x @ weight.T))
    assert not torch.equal(policy(x, t, {}), said)
    (got,) = torch.autograd.grad(said.sum(), x)
    torch.testing.assert_close(got, (1 - said**2).detach() @ weight)
    reference(x, t, {}).sum().backward()
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beta": 0}, "method.beta=0"),
        ({"trained": 0}, "method.trained=0"),
        ({"early": 1.5}, "method.early=1.5"),
        ({"quantile": 0}, "method.quantile=0"),
        ({"quantile": 1.5}, "method.quantile=1.5"),
        ({"decay": 1}, "method.decay=1"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(UserError, match=words):
        build({"type": "adjoint_matching", **values})
