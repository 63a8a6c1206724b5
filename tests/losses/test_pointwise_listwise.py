import math

import numpy as np
import pytest
import torch

from diffalign.losses.clipping import Clamp, Stop, Unlimited
from diffalign.losses.contrast import contrast
from diffalign.losses.listwise import dcg_weights, positions
from diffalign.losses.pointwise import UTILITIES, RiskSeeking2
from diffalign.losses.reference_free import ORPO, Paper, Released, amplified

VALUE = torch.tensor([-3.0, -0.2, 0.0, 0.4, 2.0], dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("sigmoid", lambda v, y: sigmoid(y * v)),
        ("loss_averse", lambda v, y: math.log(sigmoid(y * v))),
        ("risk_seeking_1", lambda v, y: -y * math.log(sigmoid(-v))),
        ("risk_seeking_2", lambda v, y: y * math.exp(v / 100) - 1),
        ("risk_seeking_3", lambda v, y: -math.log(sigmoid(-y * v))),
    ],
)
@pytest.mark.parametrize("y", [1.0, -1.0])
def test_utilities_by_hand_and_rising_towards_the_label(name, by_hand, y):
    value = VALUE.clone().requires_grad_(True)
    h = UTILITIES[name]()(value, torch.full_like(value, y))
    assert h.tolist() == pytest.approx([by_hand(v, y) for v in VALUE.tolist()], abs=1e-12)
    h.sum().backward()
    assert (y * value.grad > 0).all()


def test_positions_break_ties_by_order_and_stay_in_their_group():
    score = torch.tensor([0.2, 0.9, 0.9, 0.2, 0.5, 0.1])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert positions(score, group).tolist() == [3, 1, 2, 4, 1, 2]
    units = torch.stack([score, -score], 1)
    assert positions(units, group)[:, 0].tolist() == [3, 1, 2, 4, 1, 2]
    assert positions(units, group)[:, 1].tolist() == [1, 3, 4, 2, 2, 1]


@pytest.mark.parametrize(("base", "factor"), [(math.e, 1.0), (2.0, math.log(2))])
def test_dcg_weights_by_hand(base, factor):
    """Three images with scores 1, 1/2 and 0: gains 1, sqrt 2 - 1 and 0, discounts ln 2, ln 3, ln 4."""
    score = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    group = torch.zeros(3, dtype=torch.long)
    c = contrast(torch.zeros(3, dtype=torch.float64), score, group)
    got = dcg_weights(score, group, c.better, c.worse, base)
    half, d = math.sqrt(2) - 1, [1 / math.log(k) for k in (2, 3, 4)]
    by_pair = {(1, 0): d[0] - d[2], (2, 0): half * (d[1] - d[2]), (1, 2): (1 - half) * (d[0] - d[1])}
    wanted = [by_pair[pair] * factor for pair in zip(c.better.tolist(), c.worse.tolist(), strict=True)]
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)


def test_dcg_weights_of_ties_are_zero_and_units_are_apart():
    score = torch.tensor([[0.5, 0.1], [0.5, 0.9], [0.2, 0.9]])
    group = torch.zeros(3, dtype=torch.long)
    c = contrast(torch.zeros(3, 2), score, group)
    both = dcg_weights(score, group, c.better, c.worse)
    assert torch.equal(both == 0, c.weight == 0)
    for unit in (0, 1):
        one = contrast(torch.zeros(3), score[:, unit], group)
        alone = dcg_weights(score[:, unit], group, one.better, one.worse)
        torch.testing.assert_close(both[:, unit], alone)


def test_amplified_is_smooth_down_to_zero():
    """Against the series by hand, and its slope against central differences of the series."""
    x = torch.tensor([0.0, 1e-12, 1e-5, 0.00999, 0.01001, 0.3, 5.0], dtype=torch.float64, requires_grad=True)
    y = amplified(x)
    with np.errstate(invalid="ignore"):
        wanted = np.where(x.detach() == 0, 1.0, x.detach().numpy() / np.expm1(x.detach().numpy()))
    np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-13)
    (slope,) = torch.autograd.grad(y.sum(), x)
    e = np.exp(x.detach().numpy()[3:])
    np.testing.assert_allclose(slope[3:], (e - 1 - x.detach().numpy()[3:] * e) / (e - 1) ** 2, rtol=1e-9)
    assert slope[:3].tolist() == pytest.approx([-0.5, -0.5, -0.5 + 1e-5 / 6], abs=1e-12)


def test_amplified_in_float32_at_zero_has_a_finite_gradient():
    x = torch.zeros(3, requires_grad=True)
    amplified(x).sum().backward()
    assert x.grad.tolist() == [-0.5] * 3


@pytest.mark.parametrize(
    ("form", "by_hand"),
    [
        (
            Released(beta=0.2, snr=0.1),
            lambda w, v: w - 0.2 * math.log(sigmoid(1000 * (phi(0.1 * w) - phi(0.1 * v)))),
        ),
        (Paper(beta=8), lambda w, v: w - math.log(sigmoid(phi(w) ** 8 - phi(v) ** 8)) / 8),
        (Paper(beta=64), lambda w, v: w - math.log(sigmoid(phi(w) ** 64 - phi(v) ** 64)) / 64),
        (ORPO(), lambda w, v: w - 0.1 * math.log(sigmoid(v - w))),
        (ORPO(sign="released"), lambda w, v: w - 0.1 * math.log(sigmoid(w - v))),
    ],
)
def test_losses_of_errors_by_hand(form, by_hand):
    won = torch.tensor([0.1, 0.11, 0.5], dtype=torch.float64, requires_grad=True)
    lost = torch.tensor([0.1, 0.105, 0.9], dtype=torch.float64, requires_grad=True)
    losses = form(won, lost)
    wanted = [by_hand(w, v) for w, v in zip(won.tolist(), lost.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-11)
    losses.sum().backward()
    if form != ORPO(sign="released"):
        assert (won.grad > 0).all() and (lost.grad < 0).all()
    else:
        assert (lost.grad > 0).all()  # why it is for comparison only


def phi(x):
    return x / math.expm1(x)


def test_amplified_falls_with_a_slope_of_at_most_one_half():
    k = torch.tensor([0.0, 1e-6, 0.5, 2.0, 20.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(amplified(k).sum(), k)
    assert ((slope < 0) & (slope >= -0.5)).all()


def test_clips():
    policy = torch.tensor([-0.50, -0.52, -0.60, -0.45], dtype=torch.float64, requires_grad=True)
    reference = torch.full((4,), -0.5, dtype=torch.float64)
    plain, clamped, stopped = (c(policy, reference) for c in (Unlimited(), Clamp(0.05), Stop(0.1)))
    assert plain.tolist() == pytest.approx([0, -0.02, -0.1, 0.05])
    assert clamped.tolist() == pytest.approx([0, -0.02, -0.025, 0.025])  # r - m is twice the log-ratio
    assert stopped.tolist() == pytest.approx(plain.tolist())
    slopes = [
        torch.autograd.grad(v.sum(), policy, retain_graph=True)[0].tolist() for v in (plain, clamped, stopped)
    ]
    assert slopes == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clamp(0), "clip.limit=0"),
        (lambda: Stop(-1), "clip.excess=-1"),
        (lambda: Released(snr=0), "form.snr=0"),
        (lambda: Paper(beta=-1), "form.beta=-1"),
        (lambda: RiskSeeking2(0), "utility.softness=0"),
    ],
)
def test_bad_values(make, words):
    with pytest.raises(ValueError, match=words):
        make()
