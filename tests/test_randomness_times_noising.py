import pytest
import torch

from diffalign.errors import UserError
from diffalign.noising import Forward, rank_in_group
from diffalign.randomness import Streams, derive
from diffalign.times import Listed, LogitNormal, Uniform
from tests.helpers import Affine, sd_path


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


def test_one_row_per_stream():
    with pytest.raises(ValueError, match="3 rows asked of 2 streams"):
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
