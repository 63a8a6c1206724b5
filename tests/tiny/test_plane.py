"""Every method on the plane: reward up, mass on the support, near the known optimum; flipped labels lower
it.
"""

from dataclasses import replace

import pytest
import torch

from diffalign.losses.pairwise import IPO, Hinge, Logistic, Robust
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.tiny.plane import Plane, align, denoiser_of, energy_distance, measure, preferences, pretrain

SEEDS = range(5)
PLANE = Plane()
METHODS = {
    "dpo": DPO(beta=100),
    "ipo": DPO(beta=20, loss=IPO()),
    "hinge": DPO(beta=100, loss=Hinge()),
    "smoothed": DPO(beta=50, loss=Logistic(label_smoothing=0.1)),
    "sft": SFT(),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """A network this small is slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(one_thread):
    return pretrain(PLANE)


@pytest.fixture(scope="module")
def base_measured(base):
    return measure(PLANE, denoiser_of(base))


@pytest.fixture(scope="module")
def pairs(base):
    return {seed: preferences(PLANE, denoiser_of(base), seed=seed) for seed in SEEDS}


def turned_round(batch, share, seed):
    """The pairs with a share of the labels turned round."""
    wrong = torch.rand(batch.num_groups, generator=torch.Generator().manual_seed(seed)) < share
    return replace(batch, score=torch.where(wrong[batch.group], 1 - batch.score, batch.score))


def test_the_base_is_the_data(base_measured):
    assert (
        abs(base_measured.reward) < 0.1 and base_measured.off_support < 0.03 and base_measured.distance < 0.12
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_raises_the_reward_on_the_support(name, seed, base, base_measured, pairs):
    after = measure(PLANE, denoiser_of(align(METHODS[name], base, pairs[seed], steps=300, seed=seed)))
    # The standard error of a mean reward is 0.016.
    assert after.reward > base_measured.reward + 0.15
    assert after.off_support < 0.03
    assert after.distance < 0.13


@pytest.mark.parametrize("seed", SEEDS)
def test_robust_undoes_the_label_noise_that_it_is_told_of(seed, base, base_measured, pairs):
    """With 10 % of the labels wrong, robust DPO gets further than plain DPO does, and stays on the
    support.
    """
    noisy = turned_round(pairs[seed], 0.1, seed)
    plain = measure(PLANE, denoiser_of(align(DPO(beta=100), base, noisy, steps=300, seed=seed)))
    robust = measure(
        PLANE, denoiser_of(align(DPO(beta=100, loss=Robust(0.1)), base, noisy, steps=300, seed=seed))
    )
    assert robust.reward > plain.reward > base_measured.reward + 0.1
    assert robust.off_support < 0.03 and robust.distance < 0.13


@pytest.mark.parametrize("seed", SEEDS)
def test_flipped_labels_lower_the_reward(seed, base, base_measured, pairs):
    after = measure(
        PLANE, denoiser_of(align(DPO(beta=100), base, turned_round(pairs[seed], 1.0, seed), steps=300))
    )
    assert after.reward < base_measured.reward - 0.15 and after.off_support < 0.03


def test_too_small_a_beta_leaves_the_support(base, pairs):
    """Over-optimisation, which images hide: the reward looks best where the samples are no data any more."""
    after = measure(PLANE, denoiser_of(align(DPO(beta=5), base, pairs[0], steps=300)))
    assert after.reward > 1.2 and after.off_support > 0.1


def test_the_optimum_is_the_data_reweighted():
    """The closed form against importance weights exp(reward / tau) on plain draws."""
    g = torch.Generator().manual_seed(0)
    for label, tau in ((0, 0.5), (1, 1.0), (2, 0.3)):
        x = PLANE.data(label).points(200_000, g)
        weight = (PLANE.reward(x) / tau).softmax(0)
        expected, optimum = (weight[:, None] * x).sum(0), PLANE.optimum(label, tau)
        got = (optimum.weights[:, None] * optimum.means).sum(0)
        torch.testing.assert_close(got, expected, atol=0.01, rtol=0)
        assert PLANE.temperature(label, optimum.mean_reward()) == pytest.approx(tau, rel=1e-4)


def test_labels_are_arcs():
    x = [PLANE.data(label).points(2000, torch.Generator().manual_seed(0)) for label in range(3)]
    assert (x[1][:, 0] < 0.2).all() and (x[2][:, 0] > -0.2).all() and abs(x[0][:, 0].mean()) < 0.1


def test_energy_distance_of_equal_and_shifted_samples():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, 2, generator=g)
    assert energy_distance(a, b) < 0.08 < energy_distance(a, b + 0.5)
