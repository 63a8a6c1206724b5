import math

import numpy as np
import pytest
import torch

from diffalign.diffusion.likelihood import step_log_density, transition
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import (
    DDIM,
    FlowSDE,
    clean_and_noise,
    grid_of,
    kernel_for,
    sample,
    trajectory,
)
from diffalign.errors import UserError
from tests.helpers import VECTORS, Affine, Answers, sd_path

FLOW = RectifiedFlow()
GOLDEN = VECTORS / "flow_grpo_sde_step.npz"


def states(count=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 2, 4, 4, generator=g, dtype=torch.float64)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("level", [0.4, 1.3])
def test_the_step_is_euler_maruyama_of_the_sde(level):
    """mean = x + (v + g^2 / (2 t) (x + (1 - t) v)) dt and std = g sqrt(|dt|), as the paper writes them."""
    x, v = states()
    t, s = times(0.9, 0.5, 0.02), times(0.8, 0.3, 0.0)
    mean, std = FlowSDE(level)(Answers(v, FLOW, "flow"), x, t, s, {})
    for i, (now, then) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        g, dt = level * math.sqrt(now / (1 - now)), then - now
        expected = x[i] + (v[i] + g**2 / (2 * now) * (x[i] + (1 - now) * v[i])) * dt
        torch.testing.assert_close(mean[i], expected, atol=1e-12, rtol=0)
        assert std[i].item() == pytest.approx(g * math.sqrt(-dt), rel=1e-12)


def test_pure_noise_takes_the_next_time_for_its_denominator():
    x, v = states(1)
    mean, std = FlowSDE(0.7)(Answers(v, FLOW, "flow"), x, times(1.0), times(0.95), {})
    g2 = 0.49 * 1 / (1 - 0.95)
    assert std.item() == pytest.approx(math.sqrt(g2 * 0.05), rel=1e-12) == pytest.approx(0.7, rel=1e-12)
    torch.testing.assert_close(mean, x - 0.05 * (v + g2 / 2 * x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("level", [0.3, 0.25])
def test_dance_is_euler_maruyama_with_a_constant_noise(level):
    """DanceGRPO as its code has it: with ds = s - t and the score -(x - (1 - t) x0) / t^2 of the estimate
    x0 = x - t v, mean = x + ds v - eta^2 / 2 score ds and std = eta sqrt(-ds).
    """
    x, v = states()
    t, s = times(1.0, 0.5, 0.02), times(0.8, 0.3, 0.0)
    mean, std = FlowSDE(level, "dance")(Answers(v, FLOW, "flow"), x, t, s, {})
    for i, (now, then) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        ds, x0 = then - now, x[i] - now * v[i]
        score = -(x[i] - x0 * (1 - now)) / now**2
        expected = x[i] + ds * v[i] - 0.5 * level**2 * score * ds
        torch.testing.assert_close(mean[i], expected, atol=1e-12, rtol=0)
        assert std[i].item() == pytest.approx(level * math.sqrt(-ds), rel=1e-12)


@pytest.mark.parametrize("index", [0, 5, 14])
def test_dance_against_the_reference_implementation(index):
    f = np.load(GOLDEN)
    if f"dance_i{index}_prev" not in f or "dance_sigmas" not in f:
        pytest.skip(f"among the shipped vectors there is no dance_i{index}")
    get = lambda name: torch.from_numpy(f[f"dance_i{index}_{name}"])  # noqa: E731
    x, v = torch.from_numpy(f["x_t"]), torch.from_numpy(f["v"]).requires_grad_(True)
    sigmas = torch.from_numpy(f["dance_sigmas"]).double()
    t, s = (sigmas[i].expand(len(x)) for i in (index, index + 1))
    denoiser = Answers(v, FLOW, "flow")
    torch.testing.assert_close(clean_and_noise(denoiser, x, t, {})[0].detach(), get("x0").double(), atol=1e-6,
                               rtol=0)  # fmt: skip
    logp = step_log_density(get("prev").double(), *FlowSDE(0.3, "dance")(denoiser, x, t, s, {}))
    torch.testing.assert_close(logp.detach(), get("logp").double(), atol=1e-6, rtol=1e-6)
    logp.sum().backward()
    torch.testing.assert_close(v.grad, get("dlogp_dv").double(), atol=1e-6, rtol=1e-6)


def test_without_noise_every_form_is_the_ode():
    x, v = states()
    t, s = times(1.0, 0.6, 0.2), times(0.9, 0.4, 0.0)
    expected, _ = DDIM()(Answers(v, FLOW, "flow"), x, t, s, {})
    for form in ("sde", "cps", "dance"):
        mean, std = FlowSDE(0.0, form)(Answers(v, FLOW, "flow"), x, t, s, {})
        torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
        assert std.abs().max() == 0


def test_cps_keeps_the_amount_of_noise_of_the_path():
    """What is left of eps and what is drawn have the variance s^2 together; at level 1 all noise is new."""
    x0, eps = states()
    t, s = times(0.9, 0.5, 0.1), times(0.8, 0.3, 0.05)
    for level in (0.3, 1.0):
        mean, std = FlowSDE(level, "cps").after(FLOW, x0, eps, t, s)
        left = (mean - (1 - s).view(3, 1, 1, 1) * x0) / eps
        torch.testing.assert_close((left**2 + std**2).sqrt(), s.view(3, 1, 1, 1).expand_as(x0))
        torch.testing.assert_close(std.flatten(), s * math.sin(level * math.pi / 2))


class Exact:
    """The best velocity for data from N(m, d^2)."""

    path, target, m, d = FLOW, "flow", 0.7, 0.4

    def __call__(self, x_t, t, cond):
        t = t[:, None]
        variance = (1 - t) ** 2 * self.d**2 + t**2
        return (t - (1 - t) * self.d**2) / variance * (x_t - (1 - t) * self.m) - self.m


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), FlowSDE(0.3), FlowSDE(0.0), FlowSDE(0.5, "dance")])
def test_the_marginals_are_those_of_the_ode(kernel):
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    steps = trajectory(Exact(), kernel, x, torch.linspace(1, 0, 101), {}, torch.Generator().manual_seed(1))
    for at, t in ((50, 0.5), (99, 0.0)):
        out = steps[at].x_s if t == 0 else steps[at].x_t
        spread = math.sqrt((1 - t) ** 2 * 0.4**2 + t**2)
        assert out.mean().item() == pytest.approx((1 - t) * 0.7, abs=0.03)
        assert out.std().item() == pytest.approx(spread, abs=0.03)


@pytest.mark.parametrize("kernel", [FlowSDE(0.7), FlowSDE(0.7, "cps"), FlowSDE(0.3, "dance")])
def test_transition_scores_a_step_as_the_sampler_drew_it(kernel):
    denoiser = Affine(FLOW, torch.tensor(0.3), torch.tensor(0.05), "flow")
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    steps = trajectory(denoiser, kernel, x, torch.linspace(1, 0, 6), {}, Streams.at(0, 0, 2))
    for step in steps:
        ll = transition(denoiser, denoiser, step, {}, kernel)
        assert torch.equal(ll.policy, step.logp) and torch.equal(ll.log_ratio, torch.zeros(2))
        assert torch.isfinite(step.logp).all()
    # the last step of cps is no draw; the SDE's is one
    assert bool((steps[-1].logp == 0).all()) == (kernel.form == "cps")


def test_a_trajectory_without_noise_draws_nothing():
    denoiser = Affine(FLOW, torch.tensor(0.3), torch.tensor(0.05), "flow")
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    silent = [trajectory(denoiser, k, x, torch.linspace(1, 0, 6), {}, Streams.at(0, 0, 2)) for k in
              (FlowSDE(0.0), DDIM(0.0))]  # fmt: skip
    for one, other in zip(*silent, strict=True):
        torch.testing.assert_close(one.x_s, other.x_s)
        assert one.logp.abs().max() == 0


def test_the_kernel_of_a_path():
    assert kernel_for(sd_path(), 1.0) == DDIM(1.0) and kernel_for(sd_path(), 0.0) == DDIM(0.0)
    assert kernel_for(FLOW, 0.7) == FlowSDE(0.7) and kernel_for(FLOW, 0.0) == DDIM(0.0)
    assert kernel_for(FLOW, 0.3, "dance") == FlowSDE(0.3, "dance")
    with pytest.raises(UserError, match=r"rollout.form='cps' on VariancePreserving; allowed there: sde"):
        kernel_for(sd_path(), 1.0, "cps")
    assert [k.draws for k in (DDIM(), DDIM(0.1), FlowSDE(0.0), FlowSDE())] == [False, True, False, True]


def test_what_does_not_fit_is_refused():
    x, v = states()
    with pytest.raises(UserError, match=r"FlowSDE on VariancePreserving.*allowed there: DDIM"):
        FlowSDE()(Answers(v, sd_path()), x, times(0.5, 0.5, 0.5), times(0.4, 0.4, 0.4), {})
    with pytest.raises(UserError, match=r"level=-0.1 in form sde.*0 or more"):
        FlowSDE(-0.1)
    with pytest.raises(UserError, match=r"level=1.2 in form cps.*0 to 1"):
        FlowSDE(1.2, "cps")


@pytest.mark.parametrize("level", [0.7, 0.4])
@pytest.mark.parametrize("form", ["sde", "cps"])
def test_flow_grpo_against_the_reference_implementation(form, level):
    f = np.load(GOLDEN)
    prefix = f"{form}_nl{level}_"
    if prefix + "mean" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix}mean")
    get = lambda name: torch.from_numpy(f[prefix + name])  # noqa: E731
    sigmas, index = torch.from_numpy(f["sigmas"]), torch.from_numpy(f["step_index"])
    v = torch.from_numpy(f["v"]).requires_grad_(True)
    x = torch.from_numpy(f["x_t"])
    mean, std = FlowSDE(level, form)(Answers(v, FLOW, "flow"), x, sigmas[index], sigmas[index + 1], {})
    step_length = get("sqrt_minus_dt") if form == "sde" and prefix + "sqrt_minus_dt" in f else 1
    torch.testing.assert_close(std, get("std_dev_t") * step_length, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mean.detach(), get("mean"), atol=1e-6, rtol=0)
    for drawn, logp in (("prev_sample", "logp_own"), ("fixed_prev", "logp_fixed")):
        if form == "sde":
            density = step_log_density(get(drawn), mean, std)
        else:  # its density has no constants and no variance: see the class
            density = -((get(drawn) - mean) ** 2).flatten(1).mean(1)
        torch.testing.assert_close(density.detach(), get(logp), atol=1e-6, rtol=1e-6)
    density.sum().backward()
    torch.testing.assert_close(v.grad, get("dlogp_dv"), atol=1e-6, rtol=1e-6)


def test_the_grid_of_a_path_and_what_is_sampled_on_it():
    """DDIM's leading grid, or even steps: plain sampling of a flow is Euler's method."""
    assert grid_of(FLOW, 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert grid_of(sd_path(), 4).tolist() == pytest.approx([0.751, 0.501, 0.251, 0.001, 0.0])
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = x.clone()
    for k in range(8):
        expected -= Exact()(expected, torch.full((5,), 1 - k / 8, dtype=torch.float64), {}) / 8
    torch.testing.assert_close(sample(Exact(), x, {}, torch.Generator(), steps=8), expected)
