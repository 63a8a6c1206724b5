"""The recent methods: formulas by hand, identities, published numbers."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.losses.divergences import Alpha, ForwardKL, JensenShannon, ReverseKL
from diffalign.losses.pairwise import APODown, Hinge, Logistic
from diffalign.methods import build
from diffalign.methods.adpo import ADPO, standardised
from diffalign.methods.aot import AOT
from diffalign.methods.apo import APO
from diffalign.methods.auto_beta import AutoBeta
from diffalign.methods.dmpo import DMPO
from diffalign.methods.dpo import DPO
from diffalign.methods.dspo import DSPO
from diffalign.methods.fdpo import FDPO
from diffalign.methods.madpo import MADPO
from diffalign.methods.simpo import SimPO
from diffalign.types import Batch, Stateful
from tests.helpers import VECTORS, GivenNoise, GivenTimes, sd_path
from tests.methods.test_dpo_sft import affine_step, run_on

GOLDEN = VECTORS
METHODS = [
    DSPO(beta=0.3, scale=10), DMPO(beta=10), MADPO(beta=10), FDPO(scale=10), SimPO(beta=10), ADPO(scale=10),
    AOT(beta=10), AOT(beta=10, paired=False), APO(beta=10), APO(beta=10, variant="down"),
    AutoBeta(low=1, high=10),
]  # fmt: skip
SHIFT = 9.0  # log-probabilities here lie below it


@dataclass
class Likelihoods:
    """A denoiser of one-element samples whose -1/2 error is a given log-probability (minus SHIFT)."""

    logp: Tensor
    path: object = None
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        return (2 * (SHIFT - self.logp)).sqrt()[:, None]


def on_likelihoods(method, policy, reference, score=None, group=None, extra=None):
    """Return the public method on given log-probabilities (B,); of pairs, the first half are the winners."""
    count = len(policy)
    group = torch.arange(count // 2).repeat(2) if group is None else group
    score = torch.cat([torch.ones(count // 2), torch.zeros(count // 2)]) if score is None else score
    zeros = torch.zeros(count, 1, dtype=torch.float64)
    method = replace(method, time=GivenTimes((0.5,) * (int(group.max()) + 1)), noising=GivenNoise(zeros))
    batch = Batch(zeros, {}, group, score, extra=extra or {})
    path = sd_path()
    return method(Likelihoods(policy, path), Likelihoods(reference, path), batch, torch.Generator())


def leaves(*names, file):
    return torch.from_numpy(np.concatenate([file[n] for n in names])).requires_grad_()


def check(loss, leaf, value, gradient, atol=1e-10):
    loss.backward()
    assert loss.item() == pytest.approx(float(value), abs=atol)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, atol=atol)


def drawn(count=6, elements=10, seed=0, spread=0.05):
    g = torch.Generator().manual_seed(seed)
    return spread * torch.randn(3, count, elements, generator=g, dtype=torch.float64)


# What holds for all of them.


@pytest.mark.parametrize("method", METHODS)
def test_all_ties_give_no_loss_no_weight_and_a_gradient_path(method):
    policy = torch.randn(4, dtype=torch.float64).requires_grad_()
    step = on_likelihoods(method, policy, torch.zeros(4, dtype=torch.float64), torch.full((4,), 0.5))
    step.loss.backward()
    assert step.loss.item() == 0 and step.weight.item() == 0
    assert policy.grad.abs().max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_tie_beside_pairs_changes_only_the_weight(method):
    g = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, 6, generator=g, dtype=torch.float64)
    group, score = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 0, 0.5, 0.5, 0, 1])
    tied = on_likelihoods(method, policy, reference, score, group)
    keep = torch.tensor([0, 1, 4, 5])
    alone = on_likelihoods(
        replace(method, running=type(method.running)()) if isinstance(method, AutoBeta) else method,
        policy[keep], reference[keep], score[keep], torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip
    assert tied.weight.item() == alone.weight.item() == 2
    assert tied.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_members_may_stand_in_any_order(method):
    g = torch.Generator().manual_seed(2)
    policy, reference = torch.randn(2, 6, generator=g, dtype=torch.float64)
    group, score = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1.0, 0, 0, 1, 0, 1])
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    fresh = lambda: (  # noqa: E731
        replace(method, running=type(method.running)()) if isinstance(method, AutoBeta) else method
    )
    one = on_likelihoods(fresh(), policy, reference, score, group)
    other = on_likelihoods(fresh(), policy[order], reference[order], score[order], group[order])
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-12)


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, AOT | AutoBeta)])
def test_any_split_has_the_same_weighted_loss(method):
    """Not so AOT, which sorts over the micro-batch, nor the automatic beta, which moves with each."""
    g = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, 8, generator=g, dtype=torch.float64)
    group, score = torch.arange(4).repeat_interleave(2), torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 1, 0])
    whole = on_likelihoods(method, policy, reference, score, group)
    parts = [
        on_likelihoods(method, policy[2 * i : 2 * i + 2], reference[2 * i : 2 * i + 2],
                       score[2 * i : 2 * i + 2], torch.zeros(2, dtype=torch.int64))
        for i in range(4)
    ]  # fmt: skip
    total = sum((p.loss * p.weight).item() for p in parts) / sum(p.weight.item() for p in parts)
    assert whole.loss.item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(
    "method",
    [DMPO(beta=10), MADPO(beta=10), FDPO(scale=10), AOT(beta=10), APO(beta=10), AutoBeta(), DSPO(scale=10.0)],
)
def test_policy_equal_to_reference_has_no_margin(method):
    """Rule 3."""
    step = affine_step(method)
    assert step.metrics["rewards/accuracies"].item() == 0.5 and step.metrics["rewards/margins"].item() == 0.0


@pytest.mark.parametrize("method", [DMPO(beta=10), MADPO(beta=10), FDPO(scale=10, divergence=ReverseKL())])
def test_swapping_winner_and_loser_mirrors_the_margin(method):
    score = torch.tensor([1.0, 0, 0, 1, 1, 0])
    one, other = (affine_step(method, s, a=0.3) for s in (score, 1 - score))
    assert one.metrics["rewards/margins"].item() == pytest.approx(-other.metrics["rewards/margins"].item())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "dspo", "scale": 0}, "method.scale=0"),
        ({"type": "dmpo", "alpha": 0.5}, "method.alpha=0.5"),
        ({"type": "madpo", "c_min": 1}, "c_min=1.0, c_max=2.0"),
        ({"type": "fdpo", "divergence": {"type": "alpha", "alpha": 2}}, "divergence.alpha=2"),
        ({"type": "fdpo", "scale": -1}, "method.scale=-1.0"),
        ({"type": "simpo", "gamma": -1}, "method.gamma=-1.0"),
        ({"type": "adpo", "tau": 0}, "method.tau=0.0"),
        ({"type": "aot", "beta": 0}, "method.beta=0.0"),
        ({"type": "apo", "variant": "up"}, "method.variant.*'up'"),
        ({"type": "auto_beta", "target": 0.5}, "target=0.5"),
        ({"type": "auto_beta", "low": 3, "high": 2}, "low=3.0, high=2.0"),
        ({"type": "auto_beta", "running": 1}, "method.running"),
    ],
)
def test_bad_settings_are_refused_with_the_place(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


# DSPO.


@pytest.mark.parametrize("method", [DSPO(), DSPO(beta=0.4, scale=300.0)])
def test_dspo_is_the_squared_residual_that_it_says(method):
    """In elements, as released: sigmoid inside the square and not detached."""
    model, reference, target = drawn()
    leaf = model.clone().requires_grad_()
    m, r = ((leaf - target) ** 2).mean(1), ((reference - target) ** 2).mean(1)
    scale = method.scale or method.beta
    inside = -0.5 * scale * ((m[:3] - m[3:]) - (r[:3] - r[3:]))
    k = method.beta * (1 - torch.sigmoid(inside))[:, None]
    expected = (((leaf - target)[:3] - k * (leaf - reference)[:3]) ** 2).mean(1).mean()
    expected.backward()
    step, grad = run_on(method, model, reference, target)
    assert step.loss.item() == pytest.approx(expected.item(), abs=1e-14)
    torch.testing.assert_close(grad, leaf.grad, atol=1e-14, rtol=0)


def test_golden_dspo_and_dmpo():
    path = GOLDEN / "sdpo_dspo_dmpo.npz"
    f = np.load(path)
    for name, method in (("dspo", DSPO()), ("dmpo", DMPO())):
        step, grad = run_on(method, *(torch.from_numpy(f[k]) for k in ("model_pred", "ref_pred", "target")))
        assert step.loss.item() == pytest.approx(float(f[f"{name}_plain_loss"]), abs=1e-10)
        np.testing.assert_allclose(grad.numpy(), f[f"{name}_plain_grad"], atol=1e-10)


# DMPO and APO: Diffusion-DPO with another loss.


def test_dmpo_is_the_reverse_kl_of_diffusion_dpos_logit():
    policy, reference = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-3 * (0.3 + 0.2 - 0.1 + 0.4)))
    expected = p * math.log(p / 0.8) + (1 - p) * math.log((1 - p) / 0.2)
    step = on_likelihoods(DMPO(beta=3, alpha=0.2), policy, reference)
    assert step.loss.item() == pytest.approx(expected, abs=1e-12)


def test_apo_is_its_loss_under_dpo():
    model, reference, target = drawn()
    step, grad = run_on(APO(beta=50, variant="down"), model, reference, target)
    same, same_grad = run_on(DPO(beta=50, loss=APODown()), model, reference, target)
    assert step.loss.item() == same.loss.item() and torch.equal(grad, same_grad)
    zero, _ = run_on(APO(beta=50), model, model, target)
    assert zero.loss.item() == pytest.approx(1.0)


# f-DPO: scale and beta are separate.


def test_f_dpo_with_reverse_kl_sees_the_product_only():
    model, reference, target = drawn()
    expected, grad = run_on(DPO(beta=600), model, reference, target)
    for scale, beta in ((600, 1), (6000, 0.1), (2000, 0.3)):
        step, got = run_on(FDPO(scale=scale, beta=beta, divergence=ReverseKL()), model, reference, target)
        assert step.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
        torch.testing.assert_close(got, grad, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize(
    ("divergence", "prime"),
    [(ForwardKL(), lambda u: -1 / u), (JensenShannon(), lambda u: math.log(2 * u / (1 + u)))],
)
def test_f_dpo_by_hand(divergence, prime):
    policy, reference = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    won, lost = (0.5 * prime(math.exp(4 * x)) for x in (0.2, -0.6))
    step = on_likelihoods(FDPO(scale=4, beta=0.5, divergence=divergence), policy, reference)
    assert step.loss.item() == pytest.approx(math.log1p(math.exp(lost - won)), abs=1e-12)
    assert step.metrics["rewards/chosen"].item() == pytest.approx(won)
    assert step.metrics["rewards/margins"].item() == pytest.approx(won - lost)
    assert step.metrics["errors/chosen"].item() == pytest.approx(-0.4)


@pytest.mark.parametrize("beta", [0.1, 0.3])
@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("reverse_kl", ReverseKL()), ("forward_kl", ForwardKL()), ("jsd", JensenShannon()),
        ("alpha0.3", Alpha(0.3)), ("alpha0.5", Alpha(0.5)), ("alpha0.7", Alpha(0.7)),
    ],
)  # fmt: skip
def test_golden_f_dpo(name, divergence, beta):
    f, key = np.load(GOLDEN / "fdpo.npz"), f"{name}_b{beta}_"
    if key + "losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {key}losses")
    policy = leaves("policy_chosen", "policy_rejected", file=f)
    reference = leaves("ref_chosen", "ref_rejected", file=f).detach()
    step = on_likelihoods(FDPO(scale=1, beta=beta, divergence=divergence), policy, reference)
    gradient = np.concatenate([f[key + "grad_chosen"], f[key + "grad_rejected"]])
    check(step.loss, policy, f[key + "losses"].mean(), gradient)
    assert step.metrics["rewards/chosen"].item() == pytest.approx(f[key + "chosen_rewards"].mean(), abs=1e-10)


# MADPO.


def madpo_weight(h, c_max, c_min, lam, tau):
    if h <= -tau:
        return 1.0
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(lam * (abs(h) - tau)))
    return (1 + math.exp(-h)) / (1 + math.exp(-c * h))


def test_madpo_weights_by_hand():
    h = [-9.0, -2.1, -1.9, -0.5, 0.0, 0.5, 2.0, 6.0]
    method = MADPO(c_max=4, c_min=0.2, sharpness=2, tau=2)
    got = method.weights(torch.tensor(h, dtype=torch.float64))
    assert got.tolist() == pytest.approx([madpo_weight(x, 4, 0.2, 2, 2) for x in h], abs=1e-12)


def test_madpo_damps_easy_and_contradicted_pairs_and_climbs_back_to_one():
    """The figures of the docstring, with the setting of the author's run."""
    method = MADPO(tau=math.log(999))
    at = lambda h: method.weights(torch.tensor([h], dtype=torch.float64)).item()  # noqa: E731
    assert at(math.log(999)) == pytest.approx(1, abs=1e-12) and at(0.0) == pytest.approx(1)
    hard = method.weights(torch.linspace(0, 6.9, 500, dtype=torch.float64))
    assert (hard > 1 - 1e-9).all() and 1.15 < hard.max().item() < 1.22
    assert at(-3.0) == pytest.approx(0.06, abs=0.01) and at(9.0) < 1
    assert at(-6.9) > 0.9 and at(-6.92) == at(-50.0) == 1


def test_madpo_takes_its_margin_from_the_second_opinion_else_from_the_score():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 4, generator=g, dtype=torch.float64)
    method = MADPO(beta=2, reward_scale=3, tau=1)
    losses = [
        math.log1p(math.exp(-2 * (policy - reference)[[i, 2 + i]].diff().mul(-1).item())) for i in (0, 1)
    ]
    rewards = torch.tensor([0.3, -0.2, 0.1, 0.4])
    step = on_likelihoods(method, policy, reference, extra={"reward": rewards})
    weights = [madpo_weight(3 * h, 2, 0.5, 1, 1) for h in (0.2, -0.6)]
    assert step.loss.item() == pytest.approx(np.mean(np.multiply(weights, losses)), abs=1e-7)
    several = torch.stack([rewards + 1, rewards - 0.5], 1)
    again = on_likelihoods(method, policy, reference, extra={"reward": several})
    assert again.loss.item() == pytest.approx(step.loss.item(), abs=1e-6)
    plain = on_likelihoods(method, policy, reference)
    assert plain.loss.item() == pytest.approx(madpo_weight(3, 2, 0.5, 1, 1) * np.mean(losses), abs=1e-7)


@pytest.mark.parametrize("case", ["default", "repo_run", "cmax4_lam2"])
def test_golden_madpo(case):
    path = GOLDEN / "madpo.npz"
    if f"{case}_loss" not in np.load(path):
        pytest.skip(f"no {case} of madpo.npz")
    f = np.load(path)
    beta, c_max, c_min, sharpness, tau = map(float, f[f"{case}_hyper"])
    method = MADPO(beta=beta, c_max=c_max, c_min=c_min, sharpness=sharpness, tau=tau)
    first = torch.from_numpy(f["choices"]) == 0
    score = torch.cat([first, ~first]).double()
    policy = leaves("logp_y1", "logp_y2", file=f)
    reference, reward = (
        leaves(*names, file=f).detach() for names in (("ref_y1", "ref_y2"), ("reward1", "reward2"))
    )
    step = on_likelihoods(method, policy, reference, score, extra={"reward": reward})
    h = torch.where(first, 1, -1) * (reward[: len(first)] - reward[len(first) :])
    np.testing.assert_allclose(method.coefficients(h).numpy(), f[f"{case}_coef"], atol=1e-10)
    np.testing.assert_allclose(method.weights(h).numpy(), f[f"{case}_weight"], atol=1e-10)
    gradient = np.concatenate([f[f"{case}_grad_y1"], f[f"{case}_grad_y2"]])
    check(step.loss, policy, f[f"{case}_loss"], gradient)


# SimPO.


def test_simpo_by_hand_and_without_a_reference():
    policy = torch.tensor([0.3, -0.2, 0.1, 0.4], dtype=torch.float64)
    step = on_likelihoods(SimPO(beta=2, gamma=1), policy, torch.full((4,), torch.nan, dtype=torch.float64))
    expected = np.mean([math.log1p(math.exp(-(2 * gap - 1))) for gap in (0.2, -0.6)])
    assert step.loss.item() == pytest.approx(expected, abs=1e-12)
    assert SimPO.needs_reference is False
    # In errors: beta / 2 times their gap, gamma in units of the logit.
    model, _, target = drawn()
    m = ((model - target) ** 2).mean(1)
    got, _ = run_on(SimPO(beta=300, gamma=0.7), model, model, target)
    logit = 150 * (m[3:] - m[:3]) - 0.7
    assert got.loss.item() == pytest.approx(torch.nn.functional.softplus(-logit).mean().item(), abs=1e-12)
    assert got.metrics["denoising/chosen"].item() == pytest.approx(m[:3].mean().item())
    assert got.metrics["denoising/accuracies"].item() == pytest.approx((m[3:] > m[:3]).double().mean().item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_golden_simpo(name, smoothing):
    f, key = np.load(GOLDEN / "llm_objectives.npz"), f"simpo_{name}_ls{smoothing}_"
    if key + "losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {key}losses")
    policy = leaves("policy_chosen", "policy_rejected", file=f)
    loss = Hinge() if name == "hinge" else Logistic(smoothing)
    step = on_likelihoods(SimPO(beta=2, gamma=1, loss=loss), policy, policy.detach())
    check(step.loss, policy, f[key + "losses"].mean(), np.concatenate([f[key + "gc"], f[key + "gr"]]))


# AOT.


def aot(above, below, beta, e=0.0):
    delta = beta * (np.sort(above) - np.sort(below))
    return np.mean((1 - e) * np.logaddexp(0, -delta) + e * np.logaddexp(0, delta))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_aot_sorts_before_it_compares(smoothing):
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 10, generator=g, dtype=torch.float64)
    (pw, pl), (rw, rl) = policy.numpy().reshape(2, 5), reference.numpy().reshape(2, 5)
    method = AOT(beta=0.7, loss=Logistic(smoothing))
    paired = on_likelihoods(method, policy, reference).loss.item()
    assert paired == pytest.approx(aot(pw - pl, rw - rl, 0.7, smoothing), abs=1e-12)
    unpaired = on_likelihoods(replace(method, paired=False), policy, reference).loss.item()
    assert unpaired == pytest.approx(aot(pw - rw, pl - rl, 0.7, smoothing), abs=1e-12)


def test_aot_of_one_pair_is_dpo():
    policy, reference = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    expected = on_likelihoods(DPO(beta=3), policy, reference).loss.item()
    for paired in (True, False):
        got = on_likelihoods(AOT(beta=3, paired=paired), policy, reference).loss.item()
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "aot_ls0.1"])
def test_golden_aot(name):
    f = np.load(GOLDEN / "llm_objectives.npz")
    if f"{name}_losses" not in f:
        pytest.skip(f"among the shipped vectors there is no {name}")
    policy = leaves("policy_chosen", "policy_rejected", file=f)
    reference = leaves("ref_chosen", "ref_rejected", file=f).detach()
    loss = Logistic(0.1) if name.endswith("ls0.1") else Logistic()
    step = on_likelihoods(AOT(beta=0.1, paired="unpaired" not in name, loss=loss), policy, reference)
    value = f[f"{name}_losses"].mean()
    if f"{name}_gc" in f:
        check(step.loss, policy, value, np.concatenate([f[f"{name}_gc"], f[f"{name}_gr"]]))
    assert step.loss.item() == pytest.approx(value, abs=1e-10)


# ADPO.


def test_adpo_by_hand_on_lists_of_different_lengths():
    g = torch.Generator().manual_seed(0)
    policy, reference, score = torch.randn(3, 7, generator=g, dtype=torch.float64)
    group = torch.tensor([0, 1, 0, 1, 0, 1, 1])
    total = 0.0
    for members in (group == 0, group == 1):
        s, u = score[members].numpy(), (policy - reference)[members].numpy() * 5 / 0.8
        q = np.exp((s - s.mean()) / s.std(ddof=1) / 0.5)
        total -= ((q / q.sum()) * (u - np.log(np.exp(u).sum()))).sum() / 2
    leaf = policy.clone().requires_grad_()
    step = on_likelihoods(ADPO(scale=5), leaf, reference, score, group)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(total, abs=1e-12) and step.weight.item() == 2
    # The gradient (p - q) scale / tau sums to zero within each list.
    for i in (0, 1):
        assert leaf.grad[group == i].sum().item() == pytest.approx(0, abs=1e-12)


def test_adpo_of_sure_pairs_is_dpo():
    """q becomes one-hot as its temperature falls: DPO of beta = scale / tau."""
    policy, reference = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64)
    got = on_likelihoods(ADPO(scale=2, tau=0.5, beta_reward=0.01), policy, reference)
    assert got.loss.item() == pytest.approx(
        on_likelihoods(DPO(beta=4), policy, reference).loss.item(), abs=1e-12
    )


def test_scores_are_standardised_within_their_group():
    z, spread = standardised(torch.tensor([1.0, 5.0, 3.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1]))
    assert z.tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0, 0.0]) and spread.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_golden_adpo(tau):
    """The file's q is a softmax of raw rewards and its loss a KL: same gradient, less q's entropy."""
    path = GOLDEN / "formula_losses.npz"
    if f"adpo_tau{tau}_loss" not in np.load(path):
        pytest.skip("no adpo of formula_losses.npz")
    f = np.load(path)
    lists, k = f["adpo_reward"].shape
    total, grads = 0.0, []
    for i in range(lists):
        policy = torch.from_numpy(f["adpo_l"][i]).requires_grad_()
        reward, group = torch.from_numpy(f["adpo_reward"][i]), torch.zeros(k, dtype=torch.int64)
        std = reward.std().item()
        method = ADPO(scale=1, tau=tau, beta_reward=0.5 / std)
        step = on_likelihoods(method, policy, torch.from_numpy(f["adpo_l_ref"][i]), reward, group)
        step.loss.backward()
        q = torch.from_numpy(f["adpo_q"][i])
        total += (step.loss + (q * q.log()).sum()).item() / lists
        grads.append(policy.grad.numpy() / lists)
    assert total == pytest.approx(float(f[f"adpo_tau{tau}_loss"]), abs=1e-9)
    np.testing.assert_allclose(np.stack(grads), f[f"adpo_tau{tau}_grad"], atol=1e-9)


# Automatic beta.


@dataclass(frozen=True, eq=False)
class Masked:
    """SimpleTuner's three reductions, with a mask or without."""

    kind: str = "mean"
    mask: Tensor | None = None

    def __call__(self, squared):
        mask = (
            torch.ones_like(squared) if self.mask is None else self.mask.repeat(2, 1, 1, 1).expand_as(squared)
        )
        total = (squared * mask).flatten(1).sum(1)
        return (
            total / {"sum": 1, "mean": squared[0].numel(), "masked_mean": mask.flatten(1).sum(1)}[self.kind]
        )


def test_auto_beta_follows_the_running_mean_of_margins():
    method = AutoBeta(target=0.2, decay=0.9, low=0.1, high=1000)
    zero, mean, expected = torch.zeros(4, dtype=torch.float64), None, []
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        policy = 0.3 * torch.randn(4, generator=g, dtype=torch.float64)
        d = policy[:2] - policy[2:]
        size = d.abs().mean().item()
        mean = size if mean is None else 0.9 * mean + 0.1 * size
        beta = math.log(0.8 / 0.2) / mean
        step = on_likelihoods(method, policy, zero)
        assert step.metrics["beta"].item() == pytest.approx(beta, rel=1e-12)
        assert step.loss.item() == pytest.approx(torch.nn.functional.softplus(-beta * d).mean().item())
        expected.append(beta)
    assert len(set(expected)) == 5


def test_auto_beta_keeps_the_targeted_share_of_the_gradient():
    """One pair of average size, right way round: sigmoid(-logit) is the target."""
    policy = torch.tensor([0.05, -0.05], dtype=torch.float64)
    step = on_likelihoods(AutoBeta(low=1), policy, torch.zeros(2, dtype=torch.float64))
    assert math.exp(-step.loss.item()) == pytest.approx(0.8, abs=1e-12)


def test_auto_beta_starts_high_and_is_not_moved_by_ties_or_by_measuring():
    method, zero = AutoBeta(low=1, high=700), torch.zeros(2, dtype=torch.float64)
    policy = torch.tensor([0.2, -0.3], dtype=torch.float64)
    assert on_likelihoods(method, zero, zero).metrics["beta"].item() == 700
    on_likelihoods(method, policy, zero, torch.ones(2))
    with torch.no_grad():
        on_likelihoods(method, policy, zero)
    assert method.running.value.item() == 0
    on_likelihoods(method, policy, zero)
    assert method.running.value.item() == pytest.approx(0.5)
    assert on_likelihoods(replace(method, low=100), 9 * policy, zero).metrics["beta"].item() == 100


def test_auto_beta_keeps_its_state():
    method = AutoBeta()
    assert isinstance(method, Stateful) and not isinstance(DPO(), Stateful)
    on_likelihoods(
        method, torch.tensor([0.1, -0.23], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    )
    again = AutoBeta()
    again.load_state_dict(method.state_dict())
    assert again.running.value.item() == method.running.value.item() > 0
    assert replace(method, decay=0.5).running is method.running and AutoBeta().running.value.item() == 0


@pytest.mark.parametrize("masked", ["", "_mask"])
@pytest.mark.parametrize("kind", ["sum", "mean", "masked_mean"])
def test_golden_simpletuner(kind, masked):
    f, key = np.load(GOLDEN / "flow_dpo.npz"), f"st_{kind}{masked}_"
    if key + "loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {key}loss")
    reduce = Masked(kind, torch.from_numpy(f["st_mask"]) if masked else None)
    method = AutoBeta(low=1e-3, high=1.0, reduce=reduce)
    arrays = (torch.from_numpy(f[k]).double() for k in ("model_pred", "model_pred_ref", "target"))
    step, grad = run_on(method, *arrays)
    assert step.metrics["beta"].item() == pytest.approx(float(f[key + "beta"]), rel=1e-6)
    assert step.loss.item() == pytest.approx(float(f[key + "loss"]), abs=1e-6)
    margin = 2 * step.metrics["rewards/margins"].item() / step.metrics["beta"].item()
    assert margin == pytest.approx(f[key + "margin"].mean(), rel=1e-6)
    np.testing.assert_allclose(grad.numpy(), f[key + "grad"], atol=1e-6)


@pytest.mark.parametrize("kind", ["sum", "mean", "masked_mean"])
def test_auto_beta_clamps_mean_what_simpletuners_sums_do(kind):
    """The beta of sums is that of means over the number of elements; the logit is the same."""
    model, reference, target = (x.reshape(6, 1, 2, 5) for x in drawn())
    mask = torch.ones(3, 1, 2, 5)
    step, _ = run_on(AutoBeta(low=1e-9, high=1e9, reduce=Masked(kind, mask)), model, reference, target)
    plain, _ = run_on(AutoBeta(low=1e-9, high=1e9), model, reference, target)
    assert step.loss.item() == pytest.approx(plain.loss.item(), rel=1e-9)
    size = 10 if kind == "sum" else 1
    assert step.metrics["beta"].item() == pytest.approx(plain.metrics["beta"].item() / size, rel=1e-9)
