"""Every method on the plane: reward up, mass on the support, near the known optimum; flipped labels lower
it.
"""

import signal
from dataclasses import dataclass, replace

import pytest
import torch

from diffalign.diffusion.times import Uniform
from diffalign.losses.pairwise import Robust
from diffalign.methods import REGISTRY
from diffalign.methods.densedpo import DenseDPO
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT
from diffalign.plane.data import captions, experts, films, likes, lists, preferences, with_flipped_labels
from diffalign.plane.plane import (
    LABELS,
    PlaneNetwork,
    align,
    data_batch,
    energy_distance,
)
from diffalign.plane.settings import PLANE_METHODS
from tests.plane.conftest import PLANE, after, after_flipped, figures, unchecked

ROWS = {name: row for name, row in PLANE_METHODS.items() if not row.flow}


@pytest.fixture
def case(request, base, mislabelled, measured):
    """(row, its base, the base's figures, the name of what must rise)."""
    row = ROWS[request.param]
    about_captions = row.data is captions
    start = mislabelled if about_captions else base
    return row, start, measured(start, row.sampling), "fidelity" if about_captions else "reward"


every_row = pytest.mark.parametrize("case", ROWS, indirect=True)
every_row_that_falls = pytest.mark.parametrize(
    "case", [name for name, row in ROWS.items() if row.falls], indirect=True
)


def test_every_method_has_a_row():
    proven = {type(row.method) for row in PLANE_METHODS.values()}
    assert not [name for name, card in REGISTRY.items() if card.method not in proven]


@pytest.mark.parametrize("name", ["auto_beta", "beta_dpo"])
def test_a_row_remembers_nothing_of_its_last_run(name, base, data):
    row = PLANE_METHODS[name]
    batch, before = data(row.data, 0), row.method.state_dict()
    one, other = (row.trained(base, batch, seed=0, steps=3) for _ in range(2))
    assert row.method.state_dict() == before
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_base_is_the_data(base, measured):
    got = measured(base, 50)
    assert abs(got.reward) < 0.1 and got.off_support < 0.03 and got.distance < 0.12 and got.fidelity > 0.97


def test_the_mislabelled_base_follows_three_prompts_of_four(mislabelled, measured):
    got = measured(mislabelled, 50)
    assert 0.65 < got.fidelity < 0.85 and got.off_support < 0.03


@every_row
def test_a_method_raises_the_reward_on_the_support(case, seed, data):
    row, start, before, what = case
    got = after(row, start, data, seed)
    assert getattr(got, what) > getattr(before, what) + row.gain
    assert got.off_support < (0.03 if row.sampling == 50 else 0.75 * before.off_support)
    assert got.distance < 0.13 or not row.optimum


@every_row_that_falls
def test_flipped_labels_lower_the_reward(case, data):
    row, start, before, what = case
    assert getattr(after_flipped(row, start, data, at_least=40), what) < getattr(before, what) - row.gain


def test_robust_undoes_the_label_noise_that_it_is_told_of(seed, base, measured, data):
    """With 10 % of the labels wrong, robust DPO gets further than plain DPO does, and stays on the
    support.
    """
    noisy = with_flipped_labels(data(preferences, seed), 0.1, seed)
    with unchecked():
        plain, robust = (
            figures(align(method, base, noisy, steps=250, seed=seed, rate=2e-4))
            for method in (DPO(beta=100), DPO(beta=100, loss=Robust(0.1)))
        )
    assert robust.reward > plain.reward > measured(base).reward + 0.1
    assert robust.off_support < 0.03 and robust.distance < 0.13


def test_a_label_a_frame_says_more_than_one_by_majority(seed, base, measured, data):
    """The same pairs of films and as many steps: DenseDPO gets further than DPO on who wins more frames, and
    is nearer to the optimum. DPO's error is a mean over four frames, so its beta is four times as large.
    """
    dense = data(films, seed)
    wins = (dense.score.unflatten(0, (-1, 2)) == 1).sum(-1).float().flatten()
    majority = replace(dense, score=wins)
    ways = ((DenseDPO(beta=100, time=Uniform()), dense), (DPO(beta=400), majority))
    with unchecked():
        by_frame, by_majority = (
            figures(align(method, base, batch, steps=150, seed=seed, groups=48)) for method, batch in ways
        )
    assert by_frame.reward - 0.05 > by_majority.reward > measured(base).reward + 0.15
    assert by_frame.distance < by_majority.distance and by_frame.off_support < 0.03


def test_the_shapes_of_the_data(data):
    sizes = {preferences: 2, lists: 4, likes: 1, experts: 1, captions: 2}
    for maker, size in sizes.items():
        batch = data(maker, 0)
        assert (batch.group.bincount() == size).all() and batch.negative["label"].eq(0).all()
        assert batch.score.shape == batch.group.shape == batch.cond["label"].shape
        assert set(batch.cond["label"].tolist()) <= set(range(LABELS))


def test_flipped_data_holds_the_opposite_opinions(data):
    for maker in (preferences, likes, captions):
        assert torch.equal(data(maker, 0).score, 1 - data(maker, 0, True).score)
    assert torch.equal(data(lists, 0).score, -data(lists, 0, True).score)
    assert torch.equal(data(preferences, 0).extra["reward"], -data(preferences, 0, True).extra["reward"])
    up, down = (PLANE.reward(data(experts, 0, flipped).x).mean() for flipped in (False, True))
    assert up > 0.9 and down < -0.9


def test_a_caption_is_right_for_the_half_that_its_point_is_in(data):
    batch = data(captions, 0)
    side = torch.where(batch.x[:, 0] < 0, 1, 2)
    assert ((batch.cond["label"] == side) == (batch.score == 1)).float().mean() > 0.99
    assert torch.equal(batch.x[0::2], batch.x[1::2])


def test_too_small_a_beta_leaves_the_support(base, data):
    """Over-optimisation, which images hide: the reward looks best where the samples are no data any more."""
    with unchecked():
        got = figures(align(DPO(beta=5), base, data(preferences, 0), steps=300, groups=256, rate=2e-4))
    assert got.reward > 1.2 and got.off_support > 0.1


def test_half_a_training_is_not_measured():
    @dataclass(frozen=True)
    class Stops(SFT):
        def __call__(self, policy, reference, batch, generator):
            signal.raise_signal(signal.SIGINT)
            return super().__call__(policy, reference, batch, generator)

    with pytest.raises(KeyboardInterrupt):
        align(Stops(), PlaneNetwork(), data_batch(PLANE, 64, 0), steps=3, groups=8)


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
