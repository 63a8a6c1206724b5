import hashlib
import math

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import Forward, rank_in_group
from diffalign.diffusion.paths import RectifiedFlow, TokenLine
from diffalign.diffusion.randomness import Streams, derive, derive_each, seed_torch
from diffalign.diffusion.times import Listed, LogitNormal, Mode, Uniform, fitted, table_row
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.models.families.base import dynamic_mu
from tests.helpers import VECTORS, Affine, GivenTimes, sd_path


def test_a_draw_depends_on_its_position_and_not_on_its_batch():
    whole = Streams.at(3, 10, 4)
    t, eps = whole.uniform(4), whole.normal(4, (2, 3))
    for i in range(4):
        alone = Streams.at(3, 10 + i, 1)
        assert torch.equal(alone.uniform(1)[0], t[i])
        assert torch.equal(alone.normal(1, (2, 3))[0], eps[i])


def test_positions_seeds_and_purposes_have_different_streams():
    draws = [
        Streams.at(seed, position, 1, purpose).uniform(1).item()
        for seed in (0, 1)
        for position in (0, 1)
        for purpose in ("", "flip")
    ]
    assert len(set(draws)) == 8


def test_derived_seeds_are_stable_and_separate_words():
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert derive(0, "a", 11) != derive(0, "a1", 1)
    assert 0 <= derive(2**70, "x") < 2**63


def test_seeds_of_many_numbers_are_those_of_each():
    expected = [derive(7, "a", "", number) for number in (0, 9, 10, 123_456)]
    assert derive_each([0, 9, 10, 123_456], 7, "a", "") == expected
    text = "7\x1fa\x1f\x1f9"
    assert expected[1] == int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) >> 1


@pytest.mark.parametrize("shape", [(), (2,), (15,), (16,), (4, 5, 5)])
def test_a_row_is_what_torch_draws_from_its_generator(shape):
    """The sizes below and above 16, where torch draws normal numbers in two ways."""
    seeds, streams = [derive(3, "x", 10 + i) for i in range(4)], Streams.at(3, 10, 4, "x")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(2):
        uniform = torch.stack([torch.rand(shape, generator=g) for g in generators])
        assert torch.equal(streams.uniform(4, shape), uniform)
        normal = torch.stack([torch.randn(shape, generator=g) for g in generators])
        assert torch.equal(streams.normal(4, shape), normal)


def test_torch_is_seeded_as_by_its_own_function():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.rand(7)
    seed_torch(5, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_one_row_per_stream():
    with pytest.raises(ValueError, match="3 rows from 2 streams; allowed: one row per stream"):
        Streams([1, 2]).uniform(3)


def test_uniform_times_are_every_integer_step_equally_often():
    t = Uniform()(200_000, torch.Generator().manual_seed(0))
    index = (t * 1000).round().long()
    torch.testing.assert_close(index.double() / 1000, t, atol=1e-15, rtol=0)
    counts = index.bincount(minlength=1000)
    assert len(counts) == 1000
    # Each count is Poisson(200): 6 standard deviations.
    assert (counts - 200).abs().max() < 6 * 200**0.5


@pytest.mark.parametrize(
    ("low", "high", "first", "last"), [(0.3, 1.0, 300, 999), (0.0, 0.2, 0, 199), (0.6, 0.7, 600, 699)]
)
def test_uniform_range_is_half_open_in_steps(low, high, first, last):
    t = Uniform(low, high)(20_000, torch.Generator().manual_seed(0)) * 1000
    assert round(t.min().item()) == first and round(t.max().item()) == last


def test_continuous_and_logit_normal_and_listed():
    g = torch.Generator().manual_seed(0)
    assert len(Uniform(steps=None)(1000, g).unique()) == 1000
    t = LogitNormal()(100_000, g)
    assert abs(t.median().item() - 0.5) < 0.01
    assert abs((t < torch.sigmoid(torch.tensor(-1.0)).item()).double().mean().item() - 0.1587) < 0.005
    shifted = LogitNormal(shift=3.0)(100_000, g)
    assert abs(shifted.median().item() - 0.75) < 0.01  # 3 * .5 / (1 + 2 * .5)
    assert set(Listed((0.249, 0.999))(1000, g).tolist()) == {0.249, 0.999}


class Given:
    """A ``Random`` that gives the draws it was made with, uniform or normal."""

    def __init__(self, *draws):
        self.draws = torch.tensor(draws, dtype=torch.float64)

    def uniform(self, count, shape=()):
        return self.draws

    normal = uniform


FLOW = RectifiedFlow()
GOLDEN = VECTORS / "flow_dpo.npz"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_on_a_flow_times_are_rows_of_the_schedulers_table(shift):
    """Bit for bit the sigmas of diffusers' constructor, each equally often, 1 among them and 0 not."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    table = FlowMatchEulerDiscreteScheduler(shift=shift).sigmas.double().cpu()
    rows = table_row((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, 1000, shift)
    assert torch.equal(rows, table) and rows[0] == 1.0
    t = fitted(Uniform(shift=shift), FLOW, (4, 8, 8))(200_000, torch.Generator().manual_seed(0))
    index = torch.searchsorted(table.flip(0), t)
    assert torch.equal(table.flip(0)[index], t)
    counts = index.bincount(minlength=1000)
    assert len(counts) == 1000 and (counts - 200).abs().max() < 6 * 200**0.5


def test_the_table_against_flow_grpos_code():
    """Its u is 1 - t here: a logit-normal draw n is there the logit of u."""
    f = np.load(GOLDEN)
    u, sigmas = torch.from_numpy(f["u"]), torch.from_numpy(f["sigmas"]).flatten()
    assert torch.equal(table_row(u, 1000, 3.0), sigmas[: len(u)])
    sampler = fitted(LogitNormal(shift=3.0, steps=1000), FLOW, (4, 8, 8))
    assert torch.equal(sampler(len(u), Given(*(-torch.logit(u)).tolist())), sigmas[: len(u)])
    if "sched_sigmas" in f:
        every = table_row((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, 1000, 3.0)
        assert torch.equal(every, torch.from_numpy(f["sched_sigmas"])[:1000].double())


def test_ranges_and_continuous_times_of_a_flow_are_open_below():
    low = fitted(Uniform(0.6, 0.7), FLOW, (2,))(20_000, torch.Generator().manual_seed(0)) * 1000
    assert round(low.min().item()) == 601 and round(low.max().item()) == 700
    assert fitted(Uniform(steps=None), FLOW, (2,))(1, Given(0.0)).item() == 1.0
    shifted = fitted(Uniform(steps=None, shift=3.0), FLOW, (2,))(2, Given(0.5, 0.75))
    assert shifted.tolist() == pytest.approx([3 * 0.5 / 2, 3 * 0.25 / 1.5])
    assert fitted(GivenTimes((0.2,)), FLOW, (2,)) == GivenTimes((0.2,))


def test_a_variance_preserving_path_changes_nothing():
    for sampler in (Uniform(), Uniform(0.3, 0.9), LogitNormal(shift=2.0, steps=1000), Listed((0.1, 0.2))):
        plain, on = (
            s(50, torch.Generator().manual_seed(1)) for s in (sampler, fitted(sampler, sd_path(), (4, 8, 8)))
        )
        assert torch.equal(plain, on)


def test_mode_sampling_is_the_papers_map_and_fills_the_middle():
    """1 - u - s (cos(pi u / 2)^2 - 1 + u): ends at the ends, the middle in the middle, density 1 / |f'|."""
    by_hand = lambda u, s: 1 - u - s * (math.cos(math.pi / 2 * u) ** 2 - 1 + u)  # noqa: E731
    us = (0.0, 0.2, 0.5, 0.9)
    for scale in (1.29, 0.0):
        assert Mode(scale).continuous(4, Given(*us)).tolist() == pytest.approx(
            [by_hand(u, scale) for u in us]
        )
    t = Mode()(200_000, torch.Generator().manual_seed(0))
    middle = ((t > 0.495) & (t < 0.505)).double().mean().item() / 0.01
    assert middle == pytest.approx(1 / (1 + 1.29 - 1.29 * math.pi / 2), rel=0.05)
    assert t.min() > 0 and t.max() <= 1
    tenths = Mode(steps=10)
    assert tenths(1, Given(0.0)).item() == 0.9 and fitted(tenths, FLOW, (2,))(1, Given(0.0)).item() == 1.0


@pytest.mark.parametrize(
    ("shape", "mu"),
    [((16, 32, 32), 0.5), ((16, 128, 128), 1.15), ((16, 64, 64), 0.5 + 0.65 * (1024 - 256) / 3840)],
)
def test_a_dynamic_shift_is_that_of_the_number_of_tokens(shape, mu):
    """FLUX's line, as the family's own grid has it; a video's frames are tokens of their own."""
    sampler = LogitNormal(shift="dynamic")
    factor = math.exp(mu)
    t = fitted(sampler, FLOW, shape)(1, Given(0.0)).item()
    assert t == pytest.approx(factor * 0.5 / (1 + (factor - 1) * 0.5), rel=1e-12)
    tokens = (shape[1] // 2) * (shape[2] // 2)
    assert dynamic_mu({}, tokens) == pytest.approx(mu)
    ltx = TokenLine(patch=1, tokens=(1024, 4096), mu=(0.95, 2.05))
    assert ltx.factor((128, 4, 16, 16)) == pytest.approx(math.exp(0.95))
    listed = fitted(Listed((0.5,), shift="dynamic"), FLOW, shape)(1, Given(0.0)).item()
    assert listed == pytest.approx(t)
    with pytest.raises(UserError, match=r"time.shift='dynamic' without latents"):
        sampler(1, Given(0.0))


def test_a_dynamic_shift_is_on_the_paths_line_unless_one_is_given():
    ltx = TokenLine(patch=1, tokens=(1024, 4096), mu=(0.95, 2.05))
    path, shape = RectifiedFlow(line=ltx), (128, 16, 16, 24)
    for sampler, mu in (
        (LogitNormal(shift="dynamic"), 0.95 + 1.1 * (16 * 16 * 24 - 1024) / 3072),
        (LogitNormal(shift="dynamic", line=TokenLine()), 0.5 + 0.65 * (16 * 8 * 12 - 256) / 3840),
        (Listed((0.5,), shift="dynamic"), 0.95 + 1.1 * (16 * 16 * 24 - 1024) / 3072),
    ):
        t = fitted(sampler, path, shape)(1, Given(0.0)).item()
        assert t == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), rel=1e-12)


def test_times_of_a_configuration():
    made = build({"type": "dpo", "time": {"type": "logit_normal", "shift": "dynamic", "steps": 1000}})
    assert made.time == LogitNormal(shift="dynamic", steps=1000)
    made = build({"type": "dpo", "time": {"type": "mode", "shift": 3, "line": {"patch": 1}}})
    assert made.time == Mode(shift=3.0, line=TokenLine(patch=1))
    for shift in ("dynamyc", 0, -1):
        with pytest.raises(UserError, match="shift"):
            build({"type": "dpo", "time": {"type": "uniform", "shift": shift}})


@pytest.mark.parametrize("bad", [{"low": 0.5, "high": 0.5}, {"low": -0.1}, {"high": 1.5}, {"steps": 0}])
def test_bad_times(bad):
    with pytest.raises(UserError, match="allowed"):
        Uniform(**bad)


def test_rank_in_group():
    assert rank_in_group(torch.tensor([0, 1, 0, 0, 1])).tolist() == [0, 0, 1, 2, 1]


GROUP = torch.tensor([0, 1, 1, 0])


def noised(noising, dtype=torch.float64):
    x0 = torch.randn(4, 3, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.2, 0.9, 0.9, 0.2], dtype=dtype)
    denoiser = Affine(sd_path(), torch.tensor(0.0), torch.tensor(0.0))
    return noising(denoiser, x0, t, {}, GROUP, Streams.at(0, 0, 2))


def test_rivals_share_their_noise_and_groups_do_not():
    z = noised(Forward())
    assert torch.equal(z.eps[0], z.eps[3]) and torch.equal(z.eps[1], z.eps[2])
    assert not torch.equal(z.eps[0], z.eps[1])
    alpha, sigma = sd_path().coefficients(z.t)
    torch.testing.assert_close(z.x_t, alpha.view(-1, 1, 1, 1) * z.x0 + sigma.view(-1, 1, 1, 1) * z.eps)


def test_unshared_noise_is_all_different():
    eps = noised(Forward(shared=False)).eps
    assert len({row.sum().item() for row in eps}) == 4


def test_noise_offset_is_constant_per_channel_shared_and_in_the_target():
    plain, offset = noised(Forward()), noised(Forward(noise_offset=0.1))
    difference = offset.eps - plain.eps
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-12, rtol=0)
    assert difference.abs().max() > 0.01 and torch.equal(offset.eps[0], offset.eps[3])


def test_input_perturbation_is_seen_but_not_a_target_and_shared():
    plain, perturbed = noised(Forward()), noised(Forward(input_perturbation=0.1))
    assert torch.equal(plain.eps, perturbed.eps)
    sigma = sd_path().coefficients(plain.t)[1].view(-1, 1, 1, 1)
    extra = (perturbed.x_t - plain.x_t) / (0.1 * sigma)
    torch.testing.assert_close(extra[0], extra[3])
    assert 0.8 < extra.std().item() < 1.2
