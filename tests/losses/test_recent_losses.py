"""The losses of ``losses.pairwise`` and the divergences: by hand, at their optima, against golden numbers."""

import math

import numpy as np
import pytest
import torch

from diffalign.losses.divergences import DIVERGENCES, Alpha, ForwardKL, JensenShannon, ReverseKL
from diffalign.losses.pairwise import (
    BCO,
    EXO,
    IPO,
    LOSSES,
    NCA,
    SPPO,
    APODown,
    APOZero,
    DiscoPOP,
    Hinge,
    Logistic,
    Poly,
    Robust,
)
from diffalign.losses.pairwise import ReverseKL as DMPOLoss
from tests.helpers import VECTORS

GOLDEN = VECTORS
C = torch.tensor([-2.0, 0.0, 0.3, 4.0, -0.7], dtype=torch.float64)
R = torch.tensor([1.0, 0.0, -0.4, 0.5, -0.7], dtype=torch.float64)


def sig(x):
    return 1 / (1 + math.exp(-x))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


BY_HAND = [
    (EXO(0.1), lambda c, r: kl((sig(c - r), sig(r - c)), (0.9, 0.1))),
    (DMPOLoss(0.01), lambda c, r: kl((sig(c - r), sig(r - c)), (0.99, 0.01))),
    (DMPOLoss(0.0), lambda c, r: kl((sig(c - r), sig(r - c)), (1 - 1e-6, 1e-6))),
    (NCA(), lambda c, r: -math.log(sig(c)) - 0.5 * math.log(sig(-c)) - 0.5 * math.log(sig(-r))),
    (Poly(0.5), lambda c, r: -math.log(sig(c - r)) + 0.5 * sig(r - c)),
    (Poly(-1), lambda c, r: -math.log(sig(c - r)) - sig(r - c)),
    (BCO(), lambda c, r: -math.log(sig(c)) - math.log(sig(-r))),
    (BCO(shift=0.4), lambda c, r: -math.log(sig(c - 0.4)) - math.log(1 - sig(r - 0.4))),
    (SPPO(), lambda c, r: (c - 0.5) ** 2 + (r + 0.5) ** 2),
    (SPPO(eta=10), lambda c, r: (c - 5) ** 2 + (r + 5) ** 2),
    (APOZero(), lambda c, r: 1 - sig(c) + sig(r)),
    (APODown(), lambda c, r: sig(c) + 1 - sig(c - r)),
    (
        DiscoPOP(),
        lambda c, r: (
            (1 - sig((c - r) / 0.05)) * math.log1p(math.exp(r - c)) + sig((c - r) / 0.05) * math.exp(r - c)
        ),
    ),
]


@pytest.mark.parametrize(("loss", "by_hand"), BY_HAND)
def test_values_by_hand(loss, by_hand):
    expected = [by_hand(c, r) for c, r in zip(C.tolist(), R.tolist(), strict=True)]
    assert loss(C, R).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [loss for loss, _ in BY_HAND])
def test_gradients_are_finite_far_out_and_right_near(loss):
    far = torch.tensor([-3e3, 3e3, 0.0], requires_grad=True)
    value = loss(far, -far)
    value.sum().backward()
    assert value.isfinite().all() and far.grad.isfinite().all()
    assert torch.autograd.gradcheck(loss, (C.clone().requires_grad_(), R.clone().requires_grad_()))


def slope(loss, c, r=0.0):
    chosen = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor(r, dtype=torch.float64, requires_grad=True)
    loss(chosen, rejected).backward()
    return chosen.grad.item(), rejected.grad.item()


def test_where_gradients_vanish():
    """The optima that the docstrings state."""
    assert slope(EXO(0.1), math.log(9))[0] == pytest.approx(0, abs=1e-12)
    assert slope(DMPOLoss(0.01), math.log(99))[0] == pytest.approx(0, abs=1e-12)
    assert slope(NCA(), math.log(2))[0] == pytest.approx(0, abs=1e-12)
    assert slope(SPPO(eta=3), 1.5, -1.5) == (0, 0)
    down = slope(APODown(), 0.0)
    assert down[0] == pytest.approx(0, abs=1e-12) and down[1] == pytest.approx(0.25)


def test_a_reverse_kl_leaves_firmly_wrong_pairs_alone_and_dpo_does_not():
    assert abs(slope(EXO(), -20.0)[0]) < 1e-7 < 0.99 < -slope(Logistic(), -20.0)[0]


def test_reverse_kl_gradient_in_closed_form():
    h, e = 1.3, 0.01
    p = sig(h)
    assert slope(EXO(e), h)[0] == pytest.approx(p * (1 - p) * (h - math.log((1 - e) / e)), abs=1e-12)


def test_discopop_starts_the_wrong_way_unless_tau_is_large():
    assert slope(DiscoPOP(), 0.0)[0] == pytest.approx(0.25 / 0.05 * (1 - math.log(2)) - 0.75)
    assert slope(DiscoPOP(0.103), 0.0)[0] < 0 < slope(DiscoPOP(0.102), 0.0)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: EXO(0.0),
        lambda: EXO(0.5),
        lambda: DMPOLoss(-0.1),
        lambda: SPPO(0),
        lambda: DiscoPOP(0),
        lambda: Poly(-1.1),
        lambda: Alpha(1.5),
    ],
)
def test_bad_parameters_are_named(make):
    with pytest.raises(ValueError, match="allowed"):
        make()


def test_every_loss_of_the_table_keeps_the_shape():
    for loss in LOSSES.values():
        assert loss()(C.reshape(5, 1), R.reshape(5, 1)).shape == (5, 1)


F_PRIME = {
    ReverseKL(): lambda u: math.log(u),
    ForwardKL(): lambda u: -1 / u,
    JensenShannon(): lambda u: math.log(2 * u / (1 + u)),
    Alpha(0.3): lambda u: -(u**-0.3) / 0.3,
    Alpha(1.0): lambda u: -1 / u,
    Alpha(0.0): lambda u: math.log(u),
}


@pytest.mark.parametrize("divergence", F_PRIME)
def test_divergences_by_hand(divergence):
    expected = [F_PRIME[divergence](math.exp(x)) for x in C.tolist()]
    assert divergence(C).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("divergence", F_PRIME)
def test_divergences_rise_and_are_finite_far_out(divergence):
    x = torch.linspace(-200, 200, 401)
    got = divergence(x)
    assert got.isfinite().all() and (got.diff() >= 0).all()


def test_alpha_is_the_reverse_kl_in_the_limit():
    """Up to a constant, which a pair does not see."""
    got = Alpha(1e-6)(C)
    torch.testing.assert_close(got - got[1], C - C[1], atol=1e-5, rtol=0)


def rewards(f, beta):
    """Log-probabilities of the policy (leaves) and beta times their difference from the reference's."""
    policy = [torch.from_numpy(f[f"policy_{who}"]).requires_grad_() for who in ("chosen", "rejected")]
    held = [torch.from_numpy(f[f"ref_{who}"]) for who in ("chosen", "rejected")]
    return policy, [beta * (p - r) for p, r in zip(policy, held, strict=True)]


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_poly(case):
    f = np.load(GOLDEN / "poly_dpo_formula.npz")
    if f"{case}_a_loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {case} of poly_dpo_formula")
    get = lambda name: f[f"{case}_a_{name}"]  # noqa: E731
    logit = torch.from_numpy(get("inside")).requires_grad_()
    loss = Poly(float(get("alpha")))(logit, torch.zeros_like(logit)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(get("loss")), abs=1e-10)
    np.testing.assert_allclose(logit.grad.numpy(), get("grad"), atol=1e-10)
    np.testing.assert_allclose(-len(logit) * logit.grad.numpy(), get("weight_closed_form"), atol=1e-10)


BETA = 0.1
TRL = {  # name in the file -> (our loss, what one unit of the policy's log-ratio is worth)
    "sigmoid": (Logistic(), BETA),
    "hinge": (Hinge(), BETA),
    "ipo": (IPO(tau=BETA), 1 / 7),  # log-ratios as means over 7 tokens
    "robust_ls0.1": (Robust(0.1), BETA),
    "exo_pair_ls0.001": (EXO(1e-3), BETA),
    "nca_pair": (NCA(), BETA),
    "bco_pair": (BCO(), BETA),
    "sppo_hard": (SPPO(eta=1 / BETA), 1.0),
    "apo_zero": (APOZero(), BETA),
    "apo_down": (APODown(), BETA),
    "discopop": (DiscoPOP(), BETA),
    "sigmoid_norm": (Logistic(), BETA / 7),
}


@pytest.mark.parametrize("name", TRL)
def test_golden_trl(name):
    f = np.load(GOLDEN / "llm_objectives.npz")
    if f"{name}_losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {name}")
    loss, beta = TRL[name]
    policy, (chosen, rejected) = rewards(f, beta)
    losses = loss(chosen, rejected)
    losses.mean().backward()
    tolerance = 1e-7 if name.startswith("exo") else 1e-10  # TRL holds the label's noise in float32
    np.testing.assert_allclose(losses.detach().numpy(), f[f"{name}_losses"], atol=tolerance)
    np.testing.assert_allclose(policy[0].grad.numpy(), f[f"{name}_gc"], atol=tolerance)
    np.testing.assert_allclose(policy[1].grad.numpy(), f[f"{name}_gr"], atol=tolerance)


TRL_DIVERGENCES = {
    "trl_forward_kl_0.5": ForwardKL(),
    "trl_js_divergence_0.5": JensenShannon(),
    "trl_alpha_divergence_0.5": Alpha(0.5),
    "trl_alpha_divergence_0.3": Alpha(0.7),
    "trl_alpha_divergence_1.0": Alpha(0.0),
}


@pytest.mark.parametrize("name", TRL_DIVERGENCES)
def test_golden_trl_divergences(name):
    f = np.load(GOLDEN / "llm_objectives.npz")
    if f"{name}_losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {name}")
    policy, ratios = rewards(f, 1.0)
    chosen, rejected = (BETA * TRL_DIVERGENCES[name](x) for x in ratios)
    losses = Logistic()(chosen, rejected)
    losses.mean().backward()
    tolerance = 1e-6 if "alpha" in name else 1e-10  # TRL takes the power in float32
    np.testing.assert_allclose(losses.detach().numpy(), f[f"{name}_losses"], atol=tolerance)
    np.testing.assert_allclose(policy[0].grad.numpy(), f[f"{name}_gc"], atol=tolerance)
    np.testing.assert_allclose(policy[1].grad.numpy(), f[f"{name}_gr"], atol=tolerance)


OFFICIAL = {
    "reverse_kl": ReverseKL(),
    "forward_kl": ForwardKL(),
    "jsd": JensenShannon(),
    "alpha0.3": Alpha(0.3),
    "alpha0.5": Alpha(0.5),
    "alpha0.7": Alpha(0.7),
}


@pytest.mark.parametrize("beta", [0.1, 0.3])
@pytest.mark.parametrize("name", OFFICIAL)
def test_golden_f_dpo(name, beta):
    f, key = np.load(GOLDEN / "fdpo.npz"), f"{name}_b{beta}_"
    if key + "losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {key}losses")
    policy, ratios = rewards(f, 1.0)
    chosen, rejected = (beta * OFFICIAL[name](x) for x in ratios)
    losses = Logistic()(chosen, rejected)
    losses.mean().backward()
    got = {"losses": losses, "chosen_rewards": chosen, "rejected_rewards": rejected}
    got |= {"grad_chosen": policy[0].grad, "grad_rejected": policy[1].grad}
    for array, value in got.items():
        np.testing.assert_allclose(value.detach().numpy(), f[key + array], atol=1e-10)


def test_every_divergence_has_a_name():
    assert {type(d) for d in F_PRIME} == set(DIVERGENCES.values())
