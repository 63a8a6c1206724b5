"""DPM-Solver++(2M): against diffusers sample by sample, against an exact solution, and its early stop."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.solvers import dpm_solver, dpm_solver_step
from diffalign.types import Noised
from tests.helpers import SD_SCHEDULER, VECTORS, Affine, sd_path

GOLDEN = VECTORS / "dro.npz"


def toy(dtype=torch.float64):
    """eps(x, t) = (0.1 + t / 2) x + 0.05, of the reference vectors."""
    return Affine(sd_path(), torch.tensor(0.1, dtype=dtype), torch.tensor(0.05, dtype=dtype))


def grid(perturb, steps=20):
    """Return (steps, B) times 950 + p, 900 + p, ..., p over 1000."""
    top = 1000 - 1000 // steps
    return (torch.arange(top, -1, -1000 // steps)[:, None] + torch.as_tensor(perturb)[None]).double() / 1000


def test_each_sample_is_rolled_out_on_its_own_times():
    """A batch of three perturbations against diffusers' scheduler run on each sample alone (float32)."""
    diffusers = pytest.importorskip("diffusers")
    x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    times = grid([0, 17, 49])
    ended = dpm_solver(toy(), x.double(), times, torch.full((3,), 19), {})
    for i in range(3):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **SD_SCHEDULER, algorithm_type="dpmsolver++", solver_order=2
        )
        scheduler.set_timesteps(timesteps=(times[:, i] * 1000).round().int().tolist())
        state = x[i : i + 1]
        for t in scheduler.timesteps:
            eps = (0.1 + 0.5 * float(t) / 1000) * state + 0.05
            state = scheduler.step(eps, t, state).prev_sample
        torch.testing.assert_close(ended.x0[i : i + 1].float(), state, atol=2e-5, rtol=2e-5)


def test_stopping_early_gives_the_state_of_the_full_rollout():
    """Whatever the batch holds; and no network call is made beyond a sample's own stop."""
    calls = []

    @dataclass
    class Counted(Affine):
        log: list = field(default_factory=lambda: calls)

        def __call__(self, x_t, t, cond):
            self.log.append(len(x_t))
            assert len(cond["text"]) == len(x_t)
            return super().__call__(x_t, t, cond)

    x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = {"text": torch.arange(4, dtype=torch.float64)[:, None] / 10}
    times, stop = grid([3, 20, 0, 49]), torch.tensor([5, 0, 19, 5])
    denoiser = Counted(sd_path(), torch.tensor(0.1).double(), torch.tensor(0.05).double())
    ended = dpm_solver(denoiser, x, times, stop, cond)
    assert sum(calls) == int((stop + 1).sum()) and len(calls) == 20
    for i in range(4):
        own = {"text": cond["text"][i : i + 1]}
        alone = dpm_solver(denoiser, x[i : i + 1], times[:, i : i + 1], stop[i : i + 1], own)
        for got, wanted in zip(ended, alone, strict=True):
            torch.testing.assert_close(got[i : i + 1], wanted, atol=1e-12, rtol=0)
    assert ended.t.tolist() == times[stop, torch.arange(4)].tolist()
    assert torch.equal(ended.x_t[1], x[1])


@pytest.mark.parametrize("path", [sd_path(), RectifiedFlow()])
def test_what_the_network_said_is_the_target_of_the_state(path):
    """(x0, eps) of the result are one reading of one prediction: alpha x0 + sigma eps is x_t."""
    x = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser = Affine(path, torch.tensor(0.1).double(), torch.tensor(0.05).double())
    if isinstance(path, RectifiedFlow):
        denoiser.target = "flow"
    z = dpm_solver(denoiser, x, grid([9, 30]), torch.tensor([3, 8]), {})
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path.coefficients(z.t))
    torch.testing.assert_close(alpha * z.x0 + sigma * z.eps, z.x_t)
    said = denoiser(z.x_t, z.t, {})
    torch.testing.assert_close(said, z.eps - z.x0 if denoiser.target == "flow" else z.eps)


def test_second_order_on_a_gaussian():
    """Data N(0, 1/4): the exact network and the exact flow are known on rectified flow, and halving the step
    quarters the error; the first-order step halves it.
    """
    path, variance = RectifiedFlow(), 0.25

    class Exact:
        target = "x0"

        def __call__(self, x_t, t, cond):
            t = t.view(-1, 1)
            return (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * x_t

    exact = Exact()
    exact.path = path
    start, end = 0.9, 0.1
    std = lambda t: ((1 - t) ** 2 * variance + t**2) ** 0.5  # noqa: E731
    x = torch.tensor([[1.3]], dtype=torch.float64)
    wanted = x * std(end) / std(start)

    def error(steps, order):
        times = torch.linspace(start, end, steps + 1, dtype=torch.float64)[:, None]
        if order == 2:
            return (dpm_solver(exact, x, times, torch.tensor([steps]), {}).x_t - wanted).abs().item()
        state = x
        for t, s in itertools.pairwise(times):
            state = dpm_solver_step(path, Noised(exact(state, t, {}), state, state, t), s)
        return (state - wanted).abs().item()

    assert error(40, 2) / error(80, 2) == pytest.approx(4, rel=0.15)
    assert error(40, 1) / error(80, 1) == pytest.approx(2, rel=0.15)


def test_golden_rollout():
    """Sample 0's states as recorded, and every final sample as if run alone; their arithmetic is float32."""
    f = np.load(GOLDEN)
    if "roll/xT" not in f:
        pytest.skip("among the shipped vectors there is no roll/xT")
    x, times = torch.from_numpy(f["roll/xT"]).double(), torch.from_numpy(f["roll/timesteps"]).double() / 1000
    last = dpm_solver(toy(), x, times, torch.full((4,), 19), {})
    np.testing.assert_allclose(last.x0.numpy(), f["roll/x_final_per_sample_sigmas"], atol=1e-4)
    np.testing.assert_allclose(last.x0[0].numpy(), f["roll/x_final"][0], atol=1e-4)
    for k in range(20):
        z = dpm_solver(toy(), x, times, torch.full((4,), k), {})
        np.testing.assert_allclose(z.x_t[0].numpy(), f["roll/buf_xt"][0, k], atol=1e-4)
        np.testing.assert_allclose(z.eps[0].numpy(), f["roll/buf_eps"][0, k], atol=1e-4)
        assert (z.t * 1000).round().tolist() == f["roll/buf_t"][:, k].tolist()
