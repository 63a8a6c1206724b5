"""DDIM inversion: released trajectories, exactness, and independence of the batch."""

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.inversion import Inversion, along_grid, route_to, walk
from diffalign.diffusion.paths import RectifiedFlow, VariancePreserving, path_from_config
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from tests.helpers import SD_SCHEDULER, VECTORS, Affine, sd_path

GOLDEN = VECTORS / "ddim_inversion.npz"
f64 = {"dtype": torch.float64}


@dataclass
class Counted:
    """A denoiser that notes how many samples it was asked at what time."""

    denoiser: Any
    calls: list = field(default_factory=list)

    @property
    def path(self):
        return self.denoiser.path

    @property
    def target(self):
        return self.denoiser.target

    def __call__(self, x_t, t, cond):
        self.calls.append((t * 1000).round().long().tolist())
        return self.denoiser(x_t, t, cond)

    @property
    def samples(self):
        return sum(map(len, self.calls))


@dataclass
class Curved:
    """A prediction that is linear in nothing: of ``target``, by the text as well."""

    path: Any
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        shape = (-1,) + (1,) * (x_t.ndim - 1)
        text = cond["text"].flatten(1).mean(1).reshape(shape)
        base = 0.5 * x_t if self.target == "x0" else 0.0  # clean estimates grow with the state
        return base + 0.4 * torch.tanh(x_t + text) * (0.2 + t.reshape(shape)) + 0.1 * torch.cos(2 * x_t)


def toy(path=None, p=(0.0, 0.0)):
    """eps = (0.1 + t / 2) x + 0.05: the toy of the reference vectors."""
    return Affine(path or sd_path(), torch.tensor(0.1 + p[0], **f64), torch.tensor(0.05 + p[1], **f64))


def latents(count=4, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, 4, 4, generator=g, dtype=torch.float64)
    return x.to(dtype), {"text": torch.randn(count, 3, generator=g, dtype=torch.float64).to(dtype)}


def invert(inversion, denoiser, x, t, cond, group=None, streams=None):
    group = torch.arange(len(x)) if group is None else group
    t = torch.as_tensor(t, dtype=x.dtype)
    return inversion(denoiser, x, t, cond, group, streams or Streams.at(0, 0, int(group.max()) + 1))


# The released trajectories.


def golden_cases(prefixes):
    names = {key.split("/")[0] for key in np.load(GOLDEN).files if "/" in key}
    return sorted(name for name in names if name.startswith(prefixes))


def of_case(name):
    steps = int(name.rpartition("_N")[2])
    modern = "modern" in name or "nulltext" in name or "fixed" in name
    return Inversion(
        steps=steps,
        grid="destination" if modern else "source",
        mode="paper",
        offset=0 if "nulltext" in name else 1,
        renoise=int("renoise" in name),
    )


@pytest.mark.parametrize("name", golden_cases(("modern", "old020", "renoise", "nulltext")))
def test_golden_trajectories(name):
    f = np.load(GOLDEN)
    inversion, denoiser, x0 = of_case(name), Counted(toy()), torch.from_numpy(f["x0"])
    np.testing.assert_allclose(denoiser.path.alphas_cumprod.double().numpy(), f["alphas_cumprod"], atol=0)
    route = along_grid(inversion, denoiser.path, torch.full((len(x0),), inversion.steps))
    states = walk(inversion, denoiser, x0, route, {})
    np.testing.assert_allclose(torch.stack(states).numpy(), f[f"{name}/x"], atol=1e-12)
    told = np.array([call[0] for call in denoiser.calls])[:: 1 + inversion.renoise]
    assert told.tolist() == f[f"{name}/timesteps"].tolist()
    if f"{name}/dest_timesteps" in f:
        assert (route.destination[0] * 1000).round().tolist() == f[f"{name}/dest_timesteps"].tolist()


def test_golden_fixed_point():
    f = np.load(GOLDEN)
    x0, exact = (torch.from_numpy(f[k]) for k in ("x0", "fixedpoint_N10/x_exact"))
    inversion = replace(of_case("fixedpoint_N10"), fixed_point=200, tolerance=0.0)
    route = along_grid(inversion, sd_path(), torch.full((len(x0),), 10))
    np.testing.assert_allclose(
        torch.stack(walk(inversion, toy(), x0, route, {})).numpy(), exact.numpy(), atol=1e-12
    )
    for n in range(
        1, f["fixedpoint_N10/iterates"].shape[1] + 1
    ):  # the n-th iterate of each step, from the exact state before it
        for k in range(10):
            one = along_grid(inversion, sd_path(), torch.full((len(x0),), k + 1))
            names = ("source", "destination", "model_time")
            last = one._replace(**{name: getattr(one, name)[:, k : k + 1] for name in names})
            last = last._replace(length=torch.ones(2).long())
            got = walk(replace(inversion, fixed_point=n), toy(), exact[k], last, {})[-1]
            np.testing.assert_allclose(
                got.numpy(), f["fixedpoint_N10/iterates"][k, n - 1], atol=1e-12, err_msg=f"{k} {n}"
            )


def test_a_step_by_hand():
    """One step of each grid in plain numpy, the negative time included."""
    x0, path = torch.full((1, 1, 1, 1), 0.7, **f64), sd_path()
    ab = path.alphas_cumprod.double().numpy()
    for grid, told in (("source", -499), ("destination", 1)):
        eps = (0.1 + told / 2000) * 0.7 + 0.05
        x = np.sqrt(ab[1]) * (0.7 - np.sqrt(1 - ab[0]) * eps) / np.sqrt(ab[0]) + np.sqrt(1 - ab[1]) * eps
        denoiser = Counted(toy(path))
        t = [0.001 if grid == "source" else 0.002]
        z = invert(Inversion(steps=2, grid=grid, mode="paper"), denoiser, x0, t, {})
        assert denoiser.calls == [[told]]
        assert z.x_t.item() == pytest.approx(x, abs=1e-14)


def test_a_network_is_told_the_raw_negative_number():
    assert sd_path().model_time(torch.tensor([-0.099, 0.0, 1.0], **f64)).tolist() == [-99, 0, 999]


@pytest.mark.parametrize(
    ("t", "level"),
    [(0, 1), (1, 1), (2, 101), (101, 101), (450, 501), (801, 801), (802, 901), (950, 901), (999, 901)],
)
def test_paper_mode_stops_on_the_grid_and_tau_speaks_of_the_sampled_time(t, level):
    """The level mismatch of released InPO, as the method card has it."""
    x, cond = latents(2)
    denoiser = toy()
    z = invert(Inversion(mode="paper"), denoiser, x, [t / 1000] * 2, cond)
    route = route_to(Inversion(mode="paper"), denoiser.path, z.t)
    assert round(1000 * route.destination[0, route.length[0] - 1].item()) == level
    alpha, sigma = (c[0].item() for c in denoiser.path.coefficients(z.t))
    torch.testing.assert_close(z.eps, (z.x_t - alpha * x) / sigma, rtol=0, atol=1e-12)


# Exactness.


@pytest.mark.parametrize("grid", ["source", "destination"])
@pytest.mark.parametrize("offset", [0, 1])
def test_exact_mode_lands_on_t(grid, offset):
    path = sd_path()
    t = torch.tensor([0.0, 0.001, 0.05, 0.1, 0.101, 0.45, 0.999, 1.0], **f64)
    route = route_to(Inversion(grid=grid, offset=offset), path, t)
    for row, at in enumerate(t.clamp(max=0.999).tolist()):
        n = int(route.length[row])
        points = [0.0] + [(offset + 100 * k) / 1000 for k in range(1, 10)]
        assert n == sum(p < at - 1e-9 for p in points)
        assert int(route.on_grid[row]) == sum(p <= at + 1e-9 for p in points[1:])
        if n:
            assert route.source[row, 0] == 0 and route.destination[row, n - 1].item() == pytest.approx(at)
            assert route.destination[row, : n - 1].tolist() == pytest.approx(points[1:n])
            assert route.source[row, 1:n].tolist() == pytest.approx(points[1:n])


def test_exact_mode_is_the_solution_of_the_ode_as_steps_grow():
    """eps = x / 2 has a closed form, d(x / alpha) = alpha / 2 (x / alpha) d(sigma / alpha), integrated up to
    t itself and not to a grid point; the error falls as the step does.
    """
    path = sd_path()
    ab = path.alphas_cumprod.double()
    t = 0.437
    alpha, sigma = ab.sqrt(), (1 - ab).sqrt()
    ratio = sigma / alpha
    middle = (alpha[1:438] + alpha[:437]) / 2
    growth = torch.exp(0.5 * (middle * ratio.diff()[:437]).sum()) * alpha[437] / alpha[0]

    @dataclass
    class Half:
        path: Any
        target: str = "eps"

        def __call__(self, x_t, t, cond):
            return 0.5 * x_t

    x = torch.ones(1, 1, 1, 1, **f64)
    errors = [
        abs(invert(Inversion(steps=n), Half(path), x, [t], {}).x_t.item() - growth.item())
        for n in (10, 50, 250)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] and errors[2] < 2e-3


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_fixed_point_inversion_is_undone_by_ddim(target):
    """The exact round trip, to a grid time and to one between."""
    x, cond = latents(3)
    denoiser = Curved(sd_path(), target)
    inversion = Inversion(steps=20, grid="destination", fixed_point=400, tolerance=1e-14)
    t = torch.tensor([0.151, 0.437, 0.9], **f64)
    z = invert(inversion, denoiser, x, t, cond)
    assert back(denoiser, z, route_to(inversion, denoiser.path, t), cond) == pytest.approx(0, abs=1e-10)
    rough = invert(replace(inversion, fixed_point=0), denoiser, x, t, cond)
    assert back(denoiser, rough, route_to(inversion, denoiser.path, t), cond) > 1e-3


def back(denoiser, z, route, cond):
    """How far DDIM along the route's own levels ends from x0."""
    worst = 0.0
    for row in range(len(z.x0)):
        x, one = z.x_t[row : row + 1], {k: v[row : row + 1] for k, v in cond.items()}
        for k in reversed(range(int(route.length[row]))):
            t, s = (times[row, k : k + 1].to(x) for times in (route.destination, route.source))
            x = DDIM()(denoiser, x, t, s, one)[0]
        worst = max(worst, (x - z.x0[row]).abs().max().item())
    return worst


def test_renoise_comes_closer_than_the_plain_step():
    x, cond = latents(3)
    denoiser, t = Curved(sd_path()), torch.full((3,), 0.801, **f64)
    errors = []
    for renoise in (0, 1):
        inversion = Inversion(steps=8, grid="destination", renoise=renoise)
        z = invert(inversion, denoiser, x, t, cond)
        errors.append(back(denoiser, z, route_to(inversion, denoiser.path, t), cond))
    assert errors[1] < 0.7 * errors[0]


def test_the_loss_target_agrees_in_level_with_the_state():
    x, cond = latents(4)
    t = torch.tensor([0.0, 0.013, 0.5, 0.97], **f64)
    for mode in ("exact", "paper"):
        z = invert(Inversion(mode=mode), Curved(sd_path()), x, t, cond)
        alpha, sigma = sd_path().coefficients(t)
        again = alpha[:, None, None, None] * x + sigma[:, None, None, None] * z.eps
        torch.testing.assert_close(again, z.x_t, rtol=0, atol=1e-12)


# A batch is its samples.

SETTINGS = [
    Inversion(),
    Inversion(mode="paper"),
    Inversion(steps=7, grid="destination"),
    Inversion(steps=7, grid="destination", mode="paper", offset=0),
    Inversion(mode="paper", eta=0.1),
    Inversion(steps=5, mode="paper", renoise=1),
    Inversion(steps=6, grid="destination", fixed_point=30, tolerance=1e-4),
    Inversion(steps=6, guidance=2.0),
]
TIMES = torch.tensor([0.9, 0.25, 0.0, 0.601], **f64)


@pytest.mark.parametrize("inversion", SETTINGS)
def test_a_batch_of_different_times_is_its_samples_one_by_one(inversion):
    x, cond = latents(4)
    negative = {"text": latents(4, seed=1)[1]["text"]}

    def one(rows):
        denoiser = Curved(sd_path())
        if inversion.guidance != 1:
            denoiser = Guided(denoiser, {"text": negative["text"][rows]}, inversion.guidance)
        streams = Streams([100 + int(i) for i in rows])
        return invert(
            inversion, denoiser, x[rows], TIMES[rows], {"text": cond["text"][rows]}, streams=streams
        )

    together = one(torch.arange(4))
    for i in range(4):
        alone = one(torch.tensor([i]))
        torch.testing.assert_close(alone.x_t[0], together.x_t[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.eps[0], together.eps[i], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("mode", "each"), [("exact", [9, 3, 0, 6]), ("paper", [10, 4, 1, 7])])
def test_only_samples_on_their_way_are_asked(mode, each):
    """Calls by hand: grid points below t (0, 101, ..., 901), or sources below t (-99, 1, ..., 801)."""
    x, cond = latents(4)
    denoiser = Counted(Curved(sd_path()))
    invert(Inversion(mode=mode), denoiser, x, TIMES, cond)
    assert [len(call) for call in denoiser.calls] == [sum(n > k for n in each) for k in range(max(each))]


def test_added_noise_is_each_samples_own_and_each_groups_stream():
    """Rivals draw different noise; a group draws the same in any batch, at any time of its neighbours."""
    x, cond = latents(4)
    x, cond = x[:1].repeat(4, 1, 1, 1), {"text": cond["text"][:1].repeat(4, 1)}
    group = torch.tensor([0, 1, 0, 1])
    inversion, denoiser = Inversion(eta=0.3), Curved(sd_path())
    z = invert(inversion, denoiser, x, [0.5, 0.9, 0.5, 0.9], cond, group, Streams([7, 8]))
    assert len({round(v.item(), 9) for v in z.x_t[:, 0, 0, 0]}) == 4
    some = torch.tensor([0, 2])
    alone = invert(inversion, denoiser, x[some], [0.5, 0.5], {"text": cond["text"][some]},
                   torch.tensor([0, 0]), Streams([7]))  # fmt: skip
    torch.testing.assert_close(alone.x_t, z.x_t[some], rtol=0, atol=1e-12)


def test_added_noise_is_the_posteriors():
    """With eta 1 and one step, the spread of x_t is DDIM's posterior std; with eta 0 there is none."""
    path = sd_path()
    x = torch.zeros(4000, 1, 1, 1, **f64)
    z = invert(Inversion(steps=1, eta=1.0), toy(path), x, [0.6] * 4000, {})
    ab = path.alphas_cumprod.double()
    variance = (1 - ab[0]) / (1 - ab[600]) * (1 - ab[600] / ab[0])
    assert z.x_t.std().item() == pytest.approx(variance.sqrt().item(), rel=0.05)
    assert invert(Inversion(steps=1), toy(path), x, [0.6] * 4000, {}).x_t.std().item() < 1e-12


def test_there_is_no_gradient_through_an_inversion():
    x, cond = latents(2)
    denoiser = toy()
    denoiser.a.requires_grad_(True)
    z = invert(Inversion(), denoiser, x.requires_grad_(True), [0.5, 0.7], cond)
    assert not z.x_t.requires_grad and not z.eps.requires_grad


def test_half_precision_latents_are_inverted_in_float32():
    x, cond = latents(2, dtype=torch.bfloat16)
    z = Inversion()(
        Curved(sd_path()), x, torch.tensor([0.5, 0.7]), {k: v.float() for k, v in cond.items()},
        torch.arange(2), Streams.at(0, 0, 2),
    )  # fmt: skip
    assert z.x_t.dtype == z.eps.dtype == torch.float32


# Other paths.


def test_rectified_flow_is_eulers_method():
    """dx/dt = v from 0 to t in steps of 1/N, the last one shorter."""
    x, cond = latents(2)
    denoiser = Curved(RectifiedFlow(), "flow")
    for grid in ("source", "destination"):
        z = invert(Inversion(steps=4, grid=grid), denoiser, x, [0.6, 1.0], cond)
        for row, end in enumerate((0.6, 1.0)):
            y, now, one = x[row : row + 1], 0.0, {"text": cond["text"][row : row + 1]}
            while now < end - 1e-9:
                then = min(now + 0.25, end)
                told = torch.tensor([now if grid == "source" else then], **f64)
                y, now = y + (then - now) * denoiser(y, told, one), then
            torch.testing.assert_close(z.x_t[row : row + 1], y, rtol=0, atol=1e-12)
        torch.testing.assert_close(z.eps[1], z.x_t[1], rtol=0, atol=1e-12)  # t = 1 is pure noise


def test_rectified_flow_is_undone_exactly_and_counts_float32_grid_times_as_grid_times():
    x, cond = latents(3)
    denoiser = Curved(RectifiedFlow(), "flow")
    inversion = Inversion(steps=10, grid="destination", fixed_point=300, tolerance=1e-14)
    t = torch.tensor([0.3, 0.55, 1.0], **f64)
    z = invert(inversion, denoiser, x, t, cond)
    assert back(denoiser, z, route_to(inversion, denoiser.path, t), cond) == pytest.approx(0, abs=1e-10)
    assert route_to(Inversion(), RectifiedFlow(), torch.tensor([0.3], dtype=torch.float32)).length.item() == 3


def test_paper_mode_on_a_flow_tells_no_negative_time():
    x, cond = latents(2)
    denoiser = Counted(Curved(RectifiedFlow(), "flow"))
    z = invert(Inversion(mode="paper"), denoiser, x, [0.0, 0.35], cond)
    assert denoiser.calls[0] == [0, 0] and torch.isfinite(z.x_t).all() and torch.isfinite(z.eps).all()


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    "inversion",
    [Inversion(), Inversion(grid="destination"), Inversion(renoise=1), Inversion(eta=0.1),
     Inversion(grid="destination", fixed_point=5)],
)  # fmt: skip
def test_zero_terminal_snr_divides_by_nothing(target, inversion):
    """alpha is 0 at t = 1: the state is the noise."""
    path, _ = path_from_config({**SD_SCHEDULER, "rescale_betas_zero_snr": True})
    assert isinstance(path, VariancePreserving) and path.alphas_cumprod[-1] == 0
    x, cond = latents(2)
    z = invert(inversion, Curved(path, target), x, [1.0, 0.999], cond)
    assert torch.isfinite(z.x_t).all() and torch.equal(z.x_t, z.eps)


def test_a_sample_at_time_zero_stays():
    x, cond = latents(2)
    for path, target in ((sd_path(), "eps"), (RectifiedFlow(), "flow")):
        denoiser = Counted(Curved(path, target))
        z = invert(Inversion(), denoiser, x, [0.0, 0.0], cond)
        assert torch.equal(z.x_t, x) and not denoiser.calls and torch.isfinite(z.eps).all()


# The cache.


def cached(folder, **changes):
    return Inversion(steps=10, grid="destination", by="reference", cache=str(folder), **changes)


@pytest.mark.parametrize("mode", ["exact", "paper"])
def test_nothing_is_inverted_twice(mode, tmp_path):
    x, cond = latents(3)
    inversion, plain = cached(tmp_path, mode=mode), Inversion(grid="destination", mode=mode)
    first = Counted(Curved(sd_path()))
    invert(inversion, first, x, [0.901, 0.45, 0.0], cond)
    for times in ([0.901, 0.401, 0.101], [0.45, 0.433, 0.0], [0.201, 0.301, 0.999]):
        again = Counted(Curved(sd_path()))
        z = invert(inversion, again, x, times, cond)
        expected = invert(plain, Curved(sd_path()), x, times, cond)
        torch.testing.assert_close(z.x_t, expected.x_t, rtol=0, atol=1e-12)
        if times[0] == 0.901:  # grid points that the first visit has passed, but for the third sample's
            assert again.samples == 1
        if times[1] == 0.433:  # between grid points
            assert again.samples == (2 if mode == "exact" else 0)


def test_a_second_visit_makes_no_call_at_a_grid_time_and_one_between(tmp_path):
    x, cond = latents(2)
    invert(cached(tmp_path), Curved(sd_path()), x, [0.901, 0.901], cond)
    for times, calls in (([0.901, 0.301], []), ([0.95, 0.301], [[950]]), ([0.333, 0.444], [[333, 444]])):
        counted = Counted(Curved(sd_path()))
        invert(cached(tmp_path), counted, x, times, cond)
        assert sorted(chain.from_iterable(counted.calls)) == sorted(chain.from_iterable(calls))


def test_what_is_cached_is_known_by_all_that_it_depends_on(tmp_path):
    x, cond = latents(1)
    guided = lambda text: Guided(Curved(sd_path()), {"text": text}, 2.0)  # noqa: E731
    zeros, ones = torch.zeros(1, 3, **f64), torch.ones(1, 3, **f64)
    visits = [
        (cached(tmp_path), Curved(sd_path()), x, cond),
        (cached(tmp_path), Curved(sd_path()), x + 1e-9, cond),
        (cached(tmp_path), Curved(sd_path()), x, {"text": cond["text"] + 1e-9}),
        (cached(tmp_path, fixed_point=3), Curved(sd_path()), x, cond),
        (cached(tmp_path, guidance=2.0), guided(zeros), x, cond),
        (cached(tmp_path, guidance=2.0), guided(ones), x, cond),
    ]
    for inversion, denoiser, latent, text in visits:
        invert(inversion, denoiser, latent, [0.5], text)
    assert len(list(tmp_path.rglob("*.pt"))) == len(visits)
    assert not list(tmp_path.rglob("*.tmp"))


# Bad values.


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "noising.steps=0.*1 or more"),
        ({"grid": "sources"}, "noising.grid 'sources'.*did you mean source"),
        ({"mode": "exactly"}, "noising.mode.*did you mean exact"),
        ({"eta": -0.1}, "noising.eta=-0.1.*0 or more"),
        ({"fixed_point": 5}, "noising.fixed_point=5 with grid=source.*grid=destination"),
        ({"cache": "here"}, "noising.cache='here' with by=policy.*by=reference"),
        ({"cache": "here", "by": "reference", "eta": 0.1}, "eta=0.1"),
    ],
)
def test_bad_values_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Inversion(**fields)


def test_what_a_path_cannot_do_is_refused():
    x, cond = latents(1)
    with pytest.raises(UserError, match=r"noising.eta=0.1 on RectifiedFlow"):
        invert(Inversion(eta=0.1), Curved(RectifiedFlow(), "flow"), x, [0.5], cond)
    with pytest.raises(UserError, match=r"noising.steps=1001; allowed: 1 to 1000"):
        invert(Inversion(steps=1001), Curved(sd_path()), x, [0.5], cond)
