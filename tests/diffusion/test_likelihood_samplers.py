import math

import numpy as np
import pytest
import torch

from diffalign.diffusion.likelihood import elbo, gaussian_log_density, regression_target, transition
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, clean_and_noise, sample, timesteps, trajectory
from diffalign.errors import UserError
from diffalign.types import Noised
from tests.helpers import VECTORS, Affine, Answers, sd_path


def noisy(path, count=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, count, 2, 3, 3, generator=g, dtype=dtype)
    t = torch.tensor([0.05, 0.5, 0.95], dtype=dtype)[:count]
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path.coefficients(t))
    return Noised(x0, eps, alpha * x0 + sigma * eps, t)


@pytest.mark.parametrize(
    ("path", "targets"), [(sd_path(), ("eps", "x0", "v")), (RectifiedFlow(), ("flow", "eps", "x0"))]
)
def test_a_perfect_network_has_no_error_and_gives_back_x0_and_eps(path, targets):
    z = noisy(path)
    for target in targets:
        perfect = Answers(torch.zeros_like(z.x0), path, target)
        perfect.prediction = regression_target(target, perfect, z)
        ll = elbo(perfect, perfect, z, {})
        assert torch.equal(ll.policy, torch.zeros(3, dtype=torch.float64))
        x0, eps = clean_and_noise(perfect, z.x_t, z.t, {})
        torch.testing.assert_close(x0, z.x0)
        torch.testing.assert_close(eps, z.eps)


def test_elbo_is_minus_half_the_mean_squared_error():
    path = sd_path()
    z = noisy(path)
    ll = elbo(Answers(z.eps + 2.0, path), Answers(z.eps - 1.0, path), z, {})
    assert ll.policy.tolist() == pytest.approx([-2.0] * 3) and ll.reference.tolist() == pytest.approx(
        [-0.5] * 3
    )
    assert ll.log_ratio.tolist() == pytest.approx([-1.5] * 3)


def test_errors_are_float32_under_half_precision_predictions():
    """Rule 1: identical bfloat16 predictions give a log-ratio of exactly 0, in float32."""
    path = sd_path()
    z = noisy(path, dtype=torch.float32)
    half = Answers((z.eps + 0.3 * z.x0).bfloat16(), path)
    ll = elbo(half, half, z, {})
    assert ll.policy.dtype == torch.float32 and torch.equal(ll.log_ratio, torch.zeros(3))
    exact = -0.5 * ((half.prediction.double() - z.eps.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(ll.policy.double(), exact, atol=1e-7, rtol=1e-6)


def test_reference_has_no_gradient_and_policy_has():
    path = sd_path()
    z = noisy(path)
    weight = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    held = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    elbo(
        Affine(path, weight, torch.tensor(0.0)), Affine(path, held, torch.tensor(0.0)), z, {}
    ).log_ratio.sum().backward()
    assert weight.grad is not None and held.grad is None


def test_gaussian_log_density_is_the_mean_of_torchs():
    x, mean = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    std = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64).view(4, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_log_density(x, mean, std), expected)


def test_ddim_grid_is_the_published_one():
    assert (timesteps(20) * 1000).round().int().tolist() == [*range(951, 0, -50), 0]
    assert (timesteps(50)[0] * 1000).round().item() == 981


def test_ddim_std_and_mean_by_hand():
    path = sd_path()
    z = noisy(path, count=1)
    t, s = torch.tensor([0.951], dtype=torch.float64), torch.tensor([0.901], dtype=torch.float64)
    a, ap = (path.alphas_cumprod[i].double() for i in (951, 901))
    mean, std = DDIM(eta=1.0)(Answers(z.eps, path), z.x_t, t, s, {})
    expected = math.sqrt((1 - ap) / (1 - a) * (1 - a / ap))
    assert std.item() == pytest.approx(expected, rel=1e-12) and std.item() == pytest.approx(0.644, abs=5e-4)
    x0 = (z.x_t - (1 - a).sqrt() * z.eps) / a.sqrt()
    torch.testing.assert_close(mean, ap.sqrt() * x0 + (1 - ap - std**2).sqrt() * z.eps)


def test_transition_scores_a_step_as_the_sampler_drew_it():
    """One kernel: log-densities from sampling and from scoring are the same numbers."""
    path = sd_path()
    denoiser = Affine(path, torch.tensor(0.3), torch.tensor(0.05))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for step in trajectory(denoiser, DDIM(1.0), x, timesteps(10), {}, Streams.at(0, 0, 2)):
        ll = transition(denoiser, denoiser, step, {}, DDIM(1.0))
        assert torch.equal(ll.policy, step.logp) and torch.equal(ll.log_ratio, torch.zeros(2))


def test_deterministic_ddim_is_euler_on_a_flow():
    flow = RectifiedFlow()
    x, v = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = torch.full((2,), 0.8, dtype=torch.float64), torch.full((2,), 0.7, dtype=torch.float64)
    mean, std = DDIM()(Answers(v, flow, "flow"), x, t, s, {})
    torch.testing.assert_close(mean, x - 0.1 * v)
    assert std.abs().max() == 0
    with pytest.raises(UserError, match=r"eta=1.0 on RectifiedFlow"):
        DDIM(1.0)(Answers(v, flow, "flow"), x, t, s, {})


def test_sampling_a_gaussian_recovers_it():
    """For N(m, s^2) data the best eps prediction is known, and DDIM must bring the data back."""
    path, m, s = sd_path(), 0.7, 0.4

    class Exact:
        target = "eps"

        def __init__(self):
            self.path = path

        def __call__(self, x_t, t, cond):
            alpha, sigma = (c[:, None] for c in path.coefficients(t))
            return sigma * (x_t - alpha * m) / (alpha**2 * s**2 + sigma**2)

    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    for eta in (0.0, 1.0):
        out = sample(Exact(), x, {}, torch.Generator().manual_seed(1), steps=100, eta=eta)
        assert out.mean().item() == pytest.approx(m, abs=0.03) and out.std().item() == pytest.approx(
            s, abs=0.03
        )


@pytest.mark.parametrize("prefix", ["s20_", "s50_"])
def test_ddim_against_the_reference_implementation(prefix):
    f = np.load(VECTORS / "d3po.npz")
    if prefix + "timesteps" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix}timesteps")
    get = lambda name: torch.from_numpy(f[prefix + name])  # noqa: E731
    t, s = get("timesteps").double() / 1000, get("prev_timesteps").double() / 1000
    for suffix in ("_0", "_1"):
        denoiser = Answers(get("noise_pred" + suffix), sd_path())
        mean, std = DDIM(1.0)(denoiser, get("x_t" + suffix), t, s, {})
        torch.testing.assert_close(std.flatten(), get("std_dev_t").flatten(), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(mean, get("mean" + suffix), atol=1e-10, rtol=1e-10)
        logp = gaussian_log_density(get("x_prev" + suffix), mean, std)
        torch.testing.assert_close(logp, get("logp" + suffix), atol=5e-8, rtol=0)
