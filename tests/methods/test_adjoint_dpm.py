"""AdjointDPM: golden vectors of the released solver, autograd through the sampler at growing numbers of
steps, a matrix exponential, and memory that does not grow with the steps.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from diffalign.diffusion.adjoint import leaves_of, probability_flow
from diffalign.diffusion.paths import EDM, RectifiedFlow, VariancePreserving, path_from_config
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.adjoint_dpm import AdjointDPM
from diffalign.methods.draft import DRaFT
from diffalign.types import Batch
from tests.helpers import SD_SCHEDULER, VECTORS, sd_path
from tests.methods.test_reward_gradients import Toy, case

GOLDEN = np.load(VECTORS / "adjoint_dpm_a.npz")
DRAFT = np.load(VECTORS / "draft_k_a.npz")
VP = VariancePreserving(sd_path().alphas_cumprod.double())
FLOW = RectifiedFlow()


@dataclass
class Smooth:
    """A network whose prediction tanh(x W + b t + c) is smooth in everything."""

    path: object
    target: str = "eps"

    def __post_init__(self):
        g = torch.Generator().manual_seed(0)
        self.W = (torch.randn(5, 5, generator=g, dtype=torch.float64) / 2).requires_grad_()
        self.b = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()

    def __call__(self, x, t, cond):
        return torch.tanh(x @ self.W + self.b * t[:, None] + cond["c"])


def drawn():
    """(noise, condition, target), each (3, 5), the first two wanting gradients."""
    g = torch.Generator().manual_seed(1)
    x, c, target = torch.randn(3, 3, 5, generator=g, dtype=torch.float64)
    return x.clone().requires_grad_(), c.clone().requires_grad_(), target


def grid(path, steps):
    """Even times; of a table of 1000 rows each is a row: 0.951, ..., 0.001, 0 for 20 steps."""
    if not isinstance(path, VariancePreserving):
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    rows = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (1000 // steps) + 1
    return torch.cat([rows, torch.zeros(1, dtype=torch.float64)]) / 1000


def sampled(network, x, times, c, solver):
    """Take plain DDIM or Heun steps, written for x in alpha and sigma, to the end."""
    alpha, sigma = network.path.coefficients(times)
    flow = network.target == "flow"

    def slope(x, i):
        said = network(x, times[i].expand(len(x)), {"c": c})
        return sigma[i] * x + alpha[i] * said if network.target == "v" else said

    def move(x, slope, i):
        if flow:
            return x + (times[i + 1] - times[i]) * slope
        return alpha[i + 1] / alpha[i] * (x - sigma[i] * slope) + sigma[i + 1] * slope

    for i in range(len(times) - 1):
        one = slope(x, i)
        x = move(x, one if solver == "euler" else (one + slope(move(x, one, i), i + 1)) / 2, i)
    return x


def gaps(network, steps, solver, backward):
    """Relative differences to autograd's of four gradients: noise, condition and two parameters."""
    x, c, target = drawn()
    times, wanted = grid(network.path, steps), (x, c, network.W, network.b)
    expected = sampled(network, x, times, c, solver)
    end, _ = probability_flow(network, x, times, {"c": c}, solver=solver, backward=backward)
    torch.testing.assert_close(end, expected, rtol=1e-9, atol=1e-9)
    one, other = (torch.autograd.grad(((e - target) ** 2).sum(), wanted) for e in (expected, end))
    return [float((a - b).norm() / a.norm()) for a, b in zip(one, other, strict=True)]


three = [(VP, "eps"), (VP, "v"), (FLOW, "flow")]
every_path = pytest.mark.parametrize(("path", "target"), [*three, (EDM(), "v")])


@pytest.mark.parametrize(("path", "target"), three)
@pytest.mark.parametrize("backward", ["kept", "integrated"])
@pytest.mark.parametrize(("solver", "order", "last"), [("euler", 1, 0.09), ("heun", 2, 6e-4)])
def test_the_gradient_nears_autograds_at_the_order_of_the_solver(path, target, backward, solver, order, last):
    """At 20, 50 and 100 steps, in float64; the difference is the solver's error and falls as that does."""
    network = Smooth(path, target)
    errors = np.array([gaps(network, steps, solver, backward) for steps in (20, 50, 100)])
    slopes = np.log(errors[:-1] / errors[1:]) / np.log([[2.5], [2.0]])
    assert (slopes > order - 0.15).all(), slopes
    assert order > 1 or (slopes < 1.25).all()
    assert errors[-1].max() < last


def test_edm_spans_more_and_nears_it_later():
    errors = [max(gaps(Smooth(EDM(), "v"), steps, "heun", "integrated")) for steps in (50, 100, 200)]
    assert errors[2] < 0.3 * errors[1] < 0.1 * errors[0]


@every_path
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_exact_is_autograd(path, target, solver):
    assert max(gaps(Smooth(path, target), 20, solver, "exact")) < 1e-11


@dataclass
class Linear:
    """eps or velocity x M, whose flow is a matrix exponential."""

    path: object
    target: str
    M: torch.Tensor

    def __call__(self, x, t, cond):
        return x @ self.M


@pytest.mark.parametrize("path", [VP, FLOW])
def test_a_linear_field_is_a_matrix_exponential(path):
    """dy/drho = y M / sqrt(1 + rho^2): y_T = y_0 exp(M (asinh rho_T - asinh rho_0)); of a flow exp(-M)."""
    matrix = torch.randn(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 2
    x, probe = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    times, flow = grid(path, 100), path is FLOW
    first, last = (
        float(c[1] / c[0]) if not flow else 1 for c in map(path.coefficients, (times[:1], times[-1:]))
    )
    scale, length = 1.0, -1.0
    if not flow:
        scale, length = math.sqrt((1 + first**2) / (1 + last**2)), math.asinh(last) - math.asinh(first)
    exact = scale * torch.linalg.matrix_exp(matrix * length)
    x.requires_grad_()
    end, _ = probability_flow(Linear(path, "flow" if flow else "eps", matrix), x, times, {}, solver="heun")
    (got,) = torch.autograd.grad((end * probe).sum(), x)
    torch.testing.assert_close(end, x @ exact, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(got, probe @ exact.T, rtol=2e-3, atol=2e-3)


@dataclass(frozen=True)
class Tabled:
    """A variance-preserving path known at some times only, by its rho = sigma / alpha."""

    times: torch.Tensor
    rho: torch.Tensor

    def coefficients(self, t):
        rho = self.rho[(t[:, None].double() - self.times).abs().argmin(1)]
        return (1 + rho**2).rsqrt(), rho * (1 + rho**2).rsqrt()


@dataclass
class Released:
    """The toy of the vectors: eps = tanh(x A + c + tau t)."""

    path: Tabled
    A: torch.Tensor
    tau: torch.Tensor
    target: str = "eps"

    def __call__(self, x, t, cond):
        return torch.tanh(x @ self.A + cond["c"] + self.tau * t[:, None])


@pytest.mark.parametrize(("backward", "which"), [("kept", "adjoint"), ("exact", "discrete")])
@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_gradients_of_the_released_solver(name, backward, which):
    """Its Euler cases; its midpoint stages take the nearest time of the grid, ours have none."""
    at = lambda key: torch.from_numpy(GOLDEN[f"{name}_{key}"])  # noqa: E731
    times = at("timesteps") / 1000
    network = Released(Tabled(times, at("rho")), at("A"), at("tau"))
    c, alpha = at("cond").requires_grad_(), network.path.coefficients(times)[0]
    x = (at("y0") * alpha[0]).requires_grad_()
    end, _ = probability_flow(network, x, times, {"c": c}, backward=backward)
    y = end / alpha[-1]  # the released code reads y
    torch.testing.assert_close(y, at("y_end"), rtol=1e-10, atol=1e-10)
    loss = ((y - at("target")) ** 2).mean()
    assert loss.item() == pytest.approx(float(GOLDEN[f"{name}_loss"]), rel=1e-10)
    to_x, to_c = torch.autograd.grad(loss, (x, c))
    torch.testing.assert_close(to_x * alpha[0], at(f"grad_y0_{which}"), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(to_c, at(f"grad_cond_{which}"), rtol=1e-9, atol=1e-10)


class Meter:
    """Counts the bytes of the tensors that autograd holds for a backward, for as long as it does."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return Held(tensor, self)


class Held:
    def __init__(self, tensor, meter):
        self.tensor, self.meter = tensor, meter
        meter.now += tensor.nbytes
        meter.peak = max(meter.peak, meter.now)

    def __del__(self):
        self.meter.now -= self.tensor.nbytes


def peak_of(method, steps):
    """Most bytes that autograd holds at a time in a forward and backward of a method."""
    network, (x, c, target), meter = Smooth(VP), drawn(), Meter()
    batch = Batch(
        x.detach(), {"c": c.detach()}, torch.arange(3), torch.zeros(3), grid=grid(VP, steps),
        value=lambda latents, rows: -((latents - target) ** 2).mean(1),
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        method(network, network, batch, torch.Generator()).loss.backward()
    assert float(network.W.grad.abs().sum()) > 0
    return meter.peak


@pytest.mark.parametrize("method", [AdjointDPM(), AdjointDPM(solver="heun"), AdjointDPM(backward="exact")])
def test_what_autograd_holds_does_not_grow_with_the_steps(method):
    assert peak_of(method, 10) == peak_of(method, 40) == peak_of(method, 125)


def test_backpropagation_holds_every_step():
    assert peak_of(DRaFT(last=None), 40) > 3.5 * peak_of(DRaFT(last=None), 10) > 3 * peak_of(AdjointDPM(), 10)


@pytest.mark.parametrize(("backward", "kept"), [("integrated", 0), ("kept", 20), ("exact", 20)])
def test_only_states_are_kept_and_only_where_they_are_wanted(backward, kept):
    """Latents of every step, beside what autograd holds, and none of them by the ODE itself."""
    x, c, _ = drawn()
    end, _ = probability_flow(Smooth(VP), x, grid(VP, 20), {"c": c}, backward=backward)
    assert len(end.grad_fn.flow.states) == kept


@pytest.mark.parametrize("hold", [0.0, 0.7])
def test_exact_with_its_penalty_is_draft_over_all_steps(hold):
    policy, batch = case(DRAFT, "a2_a")
    reference = Toy(policy.W.detach() + 0.1, policy.b.detach())
    steps = [
        m(policy, reference, batch, torch.Generator())
        for m in (AdjointDPM(hold=hold, backward="exact"), DRaFT(hold=hold, last=None))
    ]
    assert steps[0].loss.item() == pytest.approx(steps[1].loss.item(), rel=1e-7)
    assert (steps[0].metrics["held"] > 0) == (hold > 0)
    one, other = (torch.autograd.grad(step.loss, (policy.W, policy.b)) for step in steps)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backward", ["integrated", "kept"])
def test_the_penalty_has_its_adjoint_too(backward):
    """The running cost's gradient nears autograd's as the reward's does."""
    errors = []
    for steps in (25, 50):
        policy, batch = case(DRAFT, "a2_a")
        reference = Toy(policy.W.detach() + 0.5, policy.b.detach())
        batch = replace(batch, grid=torch.linspace(1, 0, steps + 1, dtype=torch.float64))
        batch = replace(batch, value=lambda latents, rows: 0 * latents.sum(1))
        ways = (AdjointDPM(backward=backward), DRaFT(last=None))
        one, other = (
            torch.autograd.grad(m(policy, reference, batch, torch.Generator()).loss / steps, policy.W)[0]
            for m in ways
        )
        errors.append(float((one - other).norm() / other.norm()))
    assert errors[1] < 0.6 * errors[0] < 0.06


def test_guided_batches_and_samples_one_by_one():
    policy, batch = case(DRAFT, "a1_a")
    batch = replace(batch, guidance=3.0, negative={"c": torch.zeros_like(batch.cond["c"])})
    whole = AdjointDPM()(policy, policy, batch, torch.Generator())
    plain = DRaFT(last=None)(policy, policy, batch, torch.Generator())
    assert whole.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    alone = []
    for i in range(len(batch.x)):
        row = slice(i, i + 1)
        one = Batch(
            batch.x[row], {"c": batch.cond["c"][row]}, torch.zeros(1, dtype=torch.long), torch.zeros(1),
            negative={"c": batch.negative["c"][row]}, guidance=3.0, grid=batch.grid,
            value=batch.value,
        )  # fmt: skip
        loss = AdjointDPM()(policy, policy, one, Streams.at(0, i, 1)).loss
        alone.append(torch.autograd.grad(loss, policy.W)[0])
    (got,) = torch.autograd.grad(whole.loss, policy.W)
    torch.testing.assert_close(got, torch.stack(alone).mean(0), rtol=1e-6, atol=1e-9)


def test_gradients_go_on_to_what_made_a_condition():
    """A condition that was computed passes its gradient on, and a parameter is named once."""
    network, (x, c, target) = Smooth(VP), drawn()
    made = 2 * c
    end, _ = probability_flow(network, x, grid(VP, 20), {"c": made}, backward="exact")
    plain = sampled(network, x, grid(VP, 20), 2 * c, "euler")
    one, other = (torch.autograd.grad(((e - target) ** 2).sum(), c)[0] for e in (end, plain))
    torch.testing.assert_close(one, other)
    found = leaves_of(network(x, torch.zeros(3), {"c": made}) + network.W.sum())
    assert {id(leaf) for leaf in found} == {id(v) for v in (network.W, network.b, x, c)}
    assert len(found) == 4
    assert leaves_of(torch.zeros(1)) == []


def test_without_gradient_it_is_the_sampler():
    network, (x, c, _) = Smooth(FLOW, "flow"), drawn()
    with torch.no_grad():
        end, cost = probability_flow(network, x, grid(FLOW, 7), {"c": c}, solver="heun")
        torch.testing.assert_close(end, sampled(network, x, grid(FLOW, 7), c, "heun"))
    assert not end.requires_grad
    assert cost.tolist() == [0, 0, 0]


class Hidden(Smooth):
    """The network inside a reentrant checkpoint."""

    def __call__(self, x, t, cond):
        return checkpoint(lambda v: Smooth.__call__(self, v, t, cond), x, use_reentrant=True)


def test_reentrant_checkpoints_hide_parameters():
    x, c, _ = drawn()
    with pytest.raises(ValueError, match="reentrant"):
        probability_flow(Hidden(VP), x, grid(VP, 5), {"c": c})


def test_what_it_refuses():
    silent, _ = path_from_config({**SD_SCHEDULER, "rescale_betas_zero_snr": True})
    x, c, _ = drawn()
    trailing = torch.tensor([999, 499, 0]) / 1000
    with pytest.raises(UserError, match=r"without signal at the first sampling time, 0.999"):
        probability_flow(Smooth(silent, "v"), x, trailing, {"c": c})
    with pytest.raises(UserError, match="predicts 'eps'"):
        probability_flow(Smooth(FLOW, "eps"), x, grid(FLOW, 3), {"c": c})
    policy, batch = case(DRAFT, "a1_a")
    with pytest.raises(UserError, match="allowed: rollout"):
        AdjointDPM()(policy, policy, replace(batch, kernel=DDIM(1.0)), torch.Generator())
    for values, words in (({"solver": "rk4"}, "method.solver"), ({"backward": "both"}, "method.backward")):
        with pytest.raises(UserError, match=words):
            build({"type": "adjoint_dpm", **values})
