"""Sums, ranks and wins of several rewards, by hand arithmetic and against numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from diffalign.data.encoding.rating import wins
from diffalign.rewards.combine import combine, standardised, towards_higher

# K = 3 rivals, R = 2 rewards
SCORES = torch.tensor([[1.0, 10], [2, 10], [3, 40]])


def test_sums_ranks_and_wins_by_hand():
    assert combine(SCORES, (2.0, -0.1), "sum").tolist() == pytest.approx([1, 3, 2])
    # first reward: 0, 1/2, 1; second: two equal last ones share 0 and 1, so 1/4 each, then 1
    assert combine(SCORES, (1.0, 1.0), "rank").tolist() == pytest.approx([0.125, 0.375, 1])
    assert combine(SCORES, (1.0, 1.0), "wins").tolist() == pytest.approx([0, 0.25, 1])
    # weights 3 and 1, the second turned round: 3/4, 3/4, 0 by rank
    assert combine(SCORES, (3.0, -1.0), "rank").tolist() == pytest.approx([0.1875, 0.5625, 0.75])


def test_ranks_are_midranks_and_wins_are_syn_pics():
    random = np.random.default_rng(0)
    scores = random.integers(0, 4, (5, 7, 3)).astype(np.float32)  # with many equal ones
    weights = np.array([0.5, 2.0, 1.0])
    shares = (rankdata(scores, axis=1) - 1) / 6
    ranks = combine(torch.from_numpy(scores), weights.tolist(), "rank")
    np.testing.assert_allclose(ranks, (shares * weights).sum(-1) / 3.5, rtol=1e-6)
    np.testing.assert_allclose(ranks.mean(1), 0.5, rtol=1e-6)  # whatever the scores are
    expected = (scores[:, :, None] > scores[:, None]).sum((2, 3)) / (6 * 3)
    found = combine(torch.from_numpy(scores), (1.0, 1.0, 1.0), "wins")
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert [wins(tuple(map(tuple, group))) for group in scores.tolist()] == list(
        map(tuple, expected.tolist())
    )


@pytest.mark.parametrize("how", ["rank", "wins"])
def test_ranks_and_wins_need_no_scale_and_follow_their_rivals(how):
    scores = torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = combine(scores, (1.0, 2.0), how)
    stretched = torch.stack([scores[..., 0].exp() * 100, scores[..., 1] * 1e-3 + 7], -1)
    assert torch.equal(found, combine(stretched, (1.0, 2.0), how))
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.equal(found[:, order], combine(scores[:, order], (1.0, 2.0), how))
    assert combine(scores[:, :1], (1.0, 2.0), how).eq(0).all()  # nobody to compare with


def test_standardised_columns_and_turned_ones():
    scores = torch.cat([SCORES, torch.full((3, 1), 0.1)], 1)
    found = standardised(scores).numpy()
    expected = (SCORES.numpy() - SCORES.numpy().mean(0)) / SCORES.numpy().std(0)
    np.testing.assert_allclose(found[:, :2], expected, rtol=1e-6)
    assert (found[:, 2] == 0).all()
    assert torch.equal(towards_higher(SCORES, (2.0, -3.0)), SCORES * torch.tensor([1.0, -1]))


def test_as_many_weights_as_rewards():
    for how in ("sum", "rank", "wins"):
        with pytest.raises(ValueError, match="1 weights"):
            combine(SCORES, (1.0,), how)
