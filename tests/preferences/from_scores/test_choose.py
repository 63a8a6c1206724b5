"""Which rivals are compared: rules by hand, and invariants of all of them."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from diffalign.preferences.from_scores.choose import Comparison, Rules, choose
from diffalign.preferences.from_scores.likeness import dissimilar, distinct

SCORES = [2.0, 5.0, 1.0, 5.0, 3.5]


def pairs(rules, scores=SCORES):
    return [(one.places, one.labels) for one in choose(scores, rules)[0]]


def test_the_best_against_the_worst():
    assert pairs(Rules()) == [((1, 2), (1.0, 0.0))]  # of two equal best ones the earlier
    assert pairs(Rules(), [1.0, 4.0]) == [((0, 1), (0.0, 1.0))]
    assert pairs(Rules(), [1.0]) == [] and pairs(Rules(), []) == []


def test_the_top_against_the_bottom():
    found = pairs(Rules(choose="top-bottom", top=2))
    assert [places for places, _ in found] == [(0, 1), (0, 3), (1, 2), (2, 3)]  # 1 and 3 against 0 and 2
    assert [labels for _, labels in found] == [(0, 1), (0, 1), (1, 0), (0, 1)]
    assert pairs(Rules(choose="top-bottom", top=9)) == found  # five images have two above and two below


def test_all_pairs_with_margin_and_ties():
    found, dropped = choose(SCORES, Rules(choose="all", margin=1.5, tie=0.5))
    expected = [pair for pair in combinations(range(5), 2) if abs(SCORES[pair[0]] - SCORES[pair[1]]) >= 1.5]
    assert [one.places for one in found] == expected
    assert dropped == Counter(ties=1, close=1)  # 5 and 5; 2 and 1
    kept, dropped = choose(SCORES, Rules(choose="all", margin=1.5, tie=0.5, keep_ties=True))
    assert Comparison((1, 3), (0.5, 0.5)) in kept and dropped["ties"] == 0
    assert [one.is_tie for one in kept].count(True) == 1


def test_at_the_edges_of_margin_and_tie_band():
    assert pairs(Rules(margin=2.0), [1.0, 3.0]) == [((0, 1), (0.0, 1.0))]  # exactly the margin is enough
    assert choose([1.0, 3.0], Rules(tie=2.0))[1] == Counter(ties=1)  # exactly the band is a tie
    assert choose([1.0, 3.0], Rules(tie=2.0, margin=1.0))[1] == Counter(ties=1)  # whatever the margin


def test_the_most_of_a_prompt_are_the_widest():
    found, dropped = choose(SCORES, Rules(choose="all", most=3))
    # differences: 1-2 and 2-3 4, 0-1 and 0-3 3; equal ones in the order of their places
    assert [one.places for one in found] == [(0, 1), (1, 2), (2, 3)]
    assert dropped == Counter(ties=1, beyond=6)


def test_lists():
    assert pairs(Rules(choose="list")) == [((0, 1, 2, 3, 4), tuple(SCORES))]
    assert choose(SCORES, Rules(choose="list", margin=5.0))[1] == Counter(close=1)
    assert pairs(Rules(choose="list", tie=4.0, keep_ties=True)) == [((0, 1, 2, 3, 4), (0.5,) * 5)]


@pytest.mark.parametrize("how", ["best-worst", "top-bottom", "all"])
def test_whoever_is_preferred_scores_higher_and_everything_is_counted(how):
    random = np.random.default_rng(0)
    for _ in range(50):
        scores = random.integers(0, 6, random.integers(2, 9)).astype(float).tolist()
        rules = Rules(how, top=2, margin=2.0, tie=0.0, most=3)
        found, dropped = choose(scores, rules)
        for one in found:
            (first, second), (a, b) = one.places, one.labels
            assert first < second and (scores[first] - scores[second]) * (a - b) >= 2.0
        top = min(1 if how == "best-worst" else 2, len(scores) // 2)
        looked_at = len(scores) * (len(scores) - 1) // 2 if how == "all" else top * top
        assert len(found) + dropped.total() == looked_at and len(found) <= 3


def test_equal_contents_and_like_thumbnails():
    assert distinct(["a", "b", "a", "c", "b"]) == [0, 1, 3]
    base = np.full(768, 100, dtype=np.int16)
    other = base.copy()
    other[5] = 109
    assert dissimilar([base, base + 8, other, base - 9], 8) == [0, 2, 3]
    assert dissimilar([base, other], 9) == [0] and dissimilar([], 8) == []
