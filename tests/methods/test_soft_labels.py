"""Votes as soft labels: P l(h) + (1 - P) l(-h), and the methods that accept them."""

import numpy as np
import pytest
import torch

from diffalign.losses.contrast import contrast
from diffalign.losses.pairwise import IPO, Hinge, Logistic
from diffalign.methods import REGISTRY
from diffalign.methods._common import pair_losses
from diffalign.types import Batch


def losses(loss, log_ratio, score, votes=None, beta=2.0):
    group = torch.arange(len(score)) // 2
    extra = {} if votes is None else {"votes": torch.tensor(votes)}
    batch = Batch(torch.zeros(len(score), 1), {}, group, torch.tensor(score), extra=extra)
    c = contrast(torch.tensor(log_ratio), batch.score, group)
    return pair_losses(loss, beta * c.chosen, beta * c.rejected, c, batch).numpy()


def test_the_cross_entropy_of_the_votes_in_numpy():
    ratios, score, votes = [0.3, -0.1, 0.2, 0.4], [0.7, 0.3, 0.2, 0.8], [0.7, 0.3, 0.2, 0.8]
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    h = 2.0 * np.array([0.3 - -0.1, 0.4 - 0.2])  # better minus worse
    p = np.array([0.7, 0.8])
    expected = -(p * np.log(sigmoid(h)) + (1 - p) * np.log(sigmoid(-h)))
    np.testing.assert_allclose(losses(Logistic(), ratios, score, votes), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [Logistic(), IPO(), Hinge()])
def test_unanimous_votes_and_no_votes_are_the_hard_label(loss):
    ratios, score = [0.3, -0.1, 0.2, 0.4], [1.0, 0.0, 0.0, 1.0]
    hard = losses(loss, ratios, score)
    nan = float("nan")
    np.testing.assert_array_equal(losses(loss, ratios, score, [1.0, 0.0, nan, nan]), hard)


def test_the_optimum_of_a_soft_label_is_its_log_odds():
    h = torch.linspace(-3, 3, 6001)
    values = [losses(Logistic(), [float(x), 0.0], [0.7, 0.3], [0.7, 0.3], beta=1.0)[0] for x in h[::20]]
    assert h[::20][int(np.argmin(values))] == pytest.approx(np.log(0.7 / 0.3), abs=0.02)


def test_the_methods_that_take_votes_are_those_of_dpos_form():
    assert {name for name, card in REGISTRY.items() if card.soft} == {
        "apo", "auto_beta", "beta_dpo", "dmpo", "dpo", "fdpo", "inpo", "inversion_dpo", "madpo",
    }  # fmt: skip
