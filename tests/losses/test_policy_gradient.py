import math

import pytest
import torch

from diffalign.losses.contrast import contrast, pareto
from diffalign.losses.policy_gradient import limited, limits, ppo


def test_ppo_keeps_the_worse_of_two_bounds():
    """Up to the clip and back: the four cases of sign and direction, and one inside."""
    ratios = [1.5, 0.5, 1.5, 0.5, 1.05]
    log_ratio = torch.tensor([math.log(r) for r in ratios], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, 2.0, -2.0, -2.0, 3.0], dtype=torch.float64)
    losses, ratio = ppo(log_ratio, advantage, 0.2)
    assert losses.tolist() == pytest.approx([-2 * 1.2, -2 * 0.5, 2 * 1.5, 2 * 0.8, -3 * 1.05])
    assert ratio.tolist() == pytest.approx(ratios)
    losses.sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([0, -2 * 0.5, 2 * 1.5, 0, -3 * 1.05])


def test_ppo_is_the_policy_gradient_where_nothing_has_moved():
    log_ratio = torch.zeros(3, requires_grad=True)
    losses, _ = ppo(log_ratio, torch.tensor([1.0, -2.0, 0.5]), 1e-4)
    losses.sum().backward()
    assert losses.tolist() == log_ratio.grad.tolist() == [-1.0, 2.0, -0.5]


def test_the_limit_of_a_ratio():
    assert limits(0.1) == pytest.approx((math.log(0.9), math.log(1.1)), abs=1e-15)
    r = torch.tensor([-0.5, -0.1, 0.05, 0.2, 80.0, 1000.0], dtype=torch.float64, requires_grad=True)
    out = limited(r, 0.1)
    expected = r.detach().clamp(max=100).exp().clamp(0.9, 1.1).log()
    torch.testing.assert_close(out.detach(), expected)
    out.sum().backward()
    assert r.grad.tolist() == [0, 1, 1, 0, 0, 0]


def test_pareto_by_hand():
    first = torch.tensor([[1.0, 1], [1, 2], [2, 2], [0, 3], [1, 1], [0, 0]])
    second = torch.tensor([[1.0, 1], [1, 1], [1, 1], [3, 0], [1, 2], [1, 1]])
    assert pareto(first, second).tolist() == [0, 1, 1, 0, -1, -1]
    assert pareto(second, first).tolist() == [0, -1, -1, 0, 1, 1]


def test_a_contrast_by_pareto_puts_the_better_first():
    score = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    c = contrast(torch.tensor([1.0, 2.0, 3.0]), score, torch.zeros(3, dtype=torch.long), pareto)
    pairs = list(zip(c.better.tolist(), c.worse.tolist(), c.weight.tolist(), strict=True))
    assert pairs == [(1, 0, 1), (2, 0, 1), (1, 2, 0)]  # the last two rewards disagree about: a tie
    assert c.margin.tolist() == [1, 2, -1] and c.gap.tolist() == [1, 1, 0]
