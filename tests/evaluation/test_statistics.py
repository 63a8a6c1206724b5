"""Hand-checked values of the paired statistics."""

import math

import numpy as np
import pytest

from diffalign.evaluation.measuring.statistics import (
    Estimate,
    bootstrap_mean,
    compare,
    outcomes,
    permutation_test,
    prompt_means,
    sign_test,
    wilson,
)


def test_prompt_means_keep_the_order_of_appearance():
    names, means = prompt_means([1.0, 5.0, 2.0, 3.0], ["b", "a", "b", "b"])
    assert names == ["b", "a"] and means.tolist() == [2.0, 5.0]


def test_outcomes_count_ties_half():
    assert outcomes([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).tolist() == [1.0, 0.5, 0.0]


def test_bootstrap_of_a_coin_is_the_binomial():
    """Resampling k ones of n gives Binomial(n, k / n) / n: its exact quantiles are known."""
    n, k = 20, 10
    shares = [math.comb(n, i) / 2**n for i in range(n + 1)]
    total, low = 0.0, None
    for i, share in enumerate(shares):
        total += share
        if low is None and total >= 0.025:
            low = i / n
    estimate = bootstrap_mean([1.0] * k + [0.0] * (n - k), resamples=40_000)
    assert estimate == Estimate(0.5, low, 1 - low) and low == 0.3


def test_bootstrap_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for i in range(300):
        estimate = bootstrap_mean(random.normal(0.3, 1.0, 100), seed=i, resamples=500)
        hits += estimate.low <= 0.3 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98


def test_bootstrap_matches_the_standard_error():
    data = np.random.default_rng(1).normal(size=400)
    estimate = bootstrap_mean(data)
    half = 1.96 * data.std() / 20
    assert estimate.value == pytest.approx(data.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.04)


def test_the_seed_decides_and_blocks_do_not(monkeypatch):
    data = np.random.default_rng(2).normal(size=50)
    assert bootstrap_mean(data, seed=3) == bootstrap_mean(data, seed=3) != bootstrap_mean(data, seed=4)
    whole = bootstrap_mean(data, seed=3, resamples=100), permutation_test(data, seed=3, resamples=100)
    monkeypatch.setattr("diffalign.evaluation.measuring.statistics._BLOCK", 700)
    assert (
        bootstrap_mean(data, seed=3, resamples=100),
        permutation_test(data, seed=3, resamples=100),
    ) == whole


def test_wilson_by_hand():
    """15 of 20 at z = 1.96: (0.75 + 0.09604 -+ 1.96 sqrt(0.009375 + 0.002401)) / 1.19208."""
    estimate = wilson(15, 20, z=1.96)
    assert estimate.value == 0.75
    assert estimate.low == pytest.approx(0.53130, abs=1e-4)
    assert estimate.high == pytest.approx(0.88814, abs=1e-4)
    assert wilson(0, 10).low == 0.0 and wilson(10, 10).high == pytest.approx(1.0)
    assert wilson(4.5, 10).value == 0.45
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


def test_sign_test_by_hand():
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(7, 1) == 2 * (8 + 1) / 256
    assert sign_test(1, 7) == sign_test(7, 1)
    assert sign_test(3, 3) == 1.0 and sign_test(0, 0) == 1.0
    assert 0 < sign_test(700, 500) < 1e-7


def test_permutation_test_by_hand():
    assert permutation_test([1.0, 1.0, 1.0]) == 2 / 8
    assert permutation_test([1.0, 2.0, 3.0, -0.5]) == 4 / 16  # sums of size 5.5 or more: +-6.5 and +-5.5
    assert permutation_test([0.0, 0.0]) == 1.0
    assert permutation_test([0.3] * 10) == 2 / 1024


def test_permutation_test_of_many_is_near_the_normal_one():
    data = np.random.default_rng(5).normal(0.1, 1.0, 400)
    z = data.sum() / math.sqrt((data**2).sum())
    assert permutation_test(data) == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.012)
    assert permutation_test(np.ones(100), resamples=99) == 1 / 100  # never 0


def test_compare_by_hand():
    """Two images of "a", one of "b": prompts weigh the same."""
    result = compare([0.0, 1.0, 0.5], [1.0, 1.0, 0.0], ["a", "a", "b"])
    assert (result.base, result.aligned) == (0.5, 0.5)
    assert result.gain.value == 0.0
    assert result.win_rate.value == (0.75 + 0.0) / 2
    assert (result.wins, result.ties, result.losses, result.prompts) == (1, 1, 1, 2)


def test_swapping_the_models_mirrors_everything():
    random = np.random.default_rng(6)
    base, aligned = random.normal(size=40), random.normal(0.3, 1.0, 40)
    prompts = [f"p{i // 2}" for i in range(40)]
    there, back = compare(base, aligned, prompts), compare(aligned, base, prompts)
    assert back.gain.value == pytest.approx(-there.gain.value)
    assert back.gain.low == pytest.approx(-there.gain.high)
    assert back.win_rate.value == pytest.approx(1 - there.win_rate.value)
    assert (back.wins, back.losses) == (there.losses, there.wins)
    assert back.p_value == there.p_value


@pytest.mark.parametrize(("prompts", "low"), [(1, 0.2065), (6, 0.6097), (100, 0.9630)])
def test_a_win_on_every_prompt_is_not_certain(prompts, low):
    """Wilson: of n wins in n the interval begins at n / (n + z^2), z = 1.96."""
    names = [f"p{i // 2}" for i in range(2 * prompts)]
    won = compare([0.0] * 2 * prompts, [1.0] * 2 * prompts, names).win_rate
    lost = compare([1.0] * 2 * prompts, [0.0] * 2 * prompts, names).win_rate
    assert (won.value, won.high, lost.value, lost.low) == pytest.approx((1, 1, 0, 0), abs=1e-12)
    assert won.low == pytest.approx(low, abs=1e-4) and lost.high == pytest.approx(1 - won.low)
    tied = compare([0.0] * prompts, [0.0] * prompts, names[::2]).win_rate
    assert tied.interval == [0.5, 0.5]


def test_images_of_one_prompt_are_no_independent_evidence():
    """Ten copies of every image change no interval."""
    random = np.random.default_rng(7)
    base, aligned, prompts = random.normal(size=30), random.normal(size=30), [f"p{i}" for i in range(30)]
    once = compare(base, aligned, prompts)
    tenfold = compare(np.repeat(base, 10), np.repeat(aligned, 10), np.repeat(prompts, 10).tolist())
    assert tenfold.gain.interval == pytest.approx(once.gain.interval)
    assert tenfold.win_rate.interval == pytest.approx(once.win_rate.interval)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([1.0], [1.0, 2.0], ["a"]), "must be paired"),
        (([1.0, 2.0], [1.0, 2.0], ["a"]), "2 values but 1 prompts"),
        (([1.0, math.nan], [1.0, 2.0], ["a", "b"]), "score 1 of base"),
        (([1.0, 2.0], [math.inf, 2.0], ["a", "b"]), "score 0 of aligned"),
        (([], [], []), "nothing to compare"),
    ],
)
def test_bad_scores(arguments, words):
    with pytest.raises(ValueError, match=words):
        compare(*arguments)
