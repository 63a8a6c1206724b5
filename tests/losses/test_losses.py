import math

import pytest
import torch

from diffalign.losses.contrast import contrast, pairs_of
from diffalign.losses.pairwise import IPO, Hinge, Logistic, Robust

ZERO = torch.zeros((), dtype=torch.float64)
H = torch.tensor([-2.0, 0.0, 0.3, 4.0], dtype=torch.float64, requires_grad=True)


def log_loss(h):
    return math.log1p(math.exp(-h))


@pytest.mark.parametrize(
    ("loss", "by_hand"),
    [
        (Logistic(), log_loss),
        (Logistic(label_smoothing=0.2), lambda h: 0.8 * log_loss(h) + 0.2 * log_loss(-h)),
        (IPO(), lambda h: (h - 0.5) ** 2),
        (IPO(tau=0.1), lambda h: (h - 5) ** 2),
        (Hinge(), lambda h: max(0.0, 1 - h)),
        (Robust(0.2), lambda h: (0.8 * log_loss(h) - 0.2 * log_loss(-h)) / 0.6),
    ],
)
def test_values_by_hand(loss, by_hand):
    assert loss(H, ZERO).tolist() == pytest.approx([by_hand(h) for h in H.tolist()], abs=1e-12)


def test_smoothed_labels_have_a_finite_best_logit():
    best = math.log(0.8 / 0.2)
    h = torch.tensor(best, dtype=torch.float64, requires_grad=True)
    Logistic(label_smoothing=0.2)(h, ZERO).backward()
    assert h.grad.item() == pytest.approx(0, abs=1e-12)


def test_robust_is_unbiased_under_flipped_labels():
    e, clean, noisy = 0.3, Logistic(), Robust(0.3)
    torch.testing.assert_close((1 - e) * noisy(H, ZERO) + e * noisy(-H, ZERO), clean(H, ZERO))


@pytest.mark.parametrize("make", [lambda: IPO(0), lambda: Robust(0.5), lambda: Logistic(0.5)])
def test_bad_parameters_are_named(make):
    with pytest.raises(ValueError, match="allowed"):
        make()


def test_pairs_whatever_the_layout():
    assert [i.tolist() for i in pairs_of(torch.tensor([0, 1, 0, 1]))] == [[0, 1], [2, 3]]
    first, second = pairs_of(torch.tensor([0, 0, 0, 1]))
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 2)]


def test_contrast_orders_by_score_and_masks_ties():
    ratio = torch.tensor([1.0, 5.0, 2.0, 7.0], requires_grad=True)
    c = contrast(ratio, torch.tensor([0.0, 1.0, 0.5, 0.5]), torch.tensor([0, 0, 1, 1]))
    assert (
        c.margin.tolist() == [4.0, -5.0] and c.weight.tolist() == [1.0, 0.0] and c.gap.tolist() == [1.0, 0.0]
    )
    assert c.mean(c.margin).item() == 4.0
    c.mean(c.margin).backward()
    assert ratio.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_all_ties_give_zero_with_a_gradient_path():
    ratio = torch.tensor([1.0, 5.0], requires_grad=True)
    c = contrast(ratio, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    loss = c.mean(Logistic()(c.chosen, c.rejected))
    loss.backward()
    assert loss.item() == 0 and ratio.grad.tolist() == [0.0, 0.0] and c.count.item() == 0


def test_swapping_scores_mirrors_the_margin():
    ratio, group = (
        torch.randn(6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 0, 1, 1, 2, 2]),
    )
    score = torch.tensor([1.0, 0, 0, 1, 1, 0])
    assert torch.equal(contrast(ratio, score, group).margin, -contrast(ratio, 1 - score, group).margin)


def test_dense_units_may_disagree():
    ratio = torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]])
    c = contrast(ratio, torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]), torch.tensor([0, 0]))
    assert c.margin.tolist() == [[-3.0, 4.0, -5.0]] and c.weight.tolist() == [[1.0, 1.0, 0.0]]
