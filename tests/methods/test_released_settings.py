"""Settings and forms of released codes that no other test holds against the numbers of a reference."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.diffusion.likelihood import log_density, step_log_density
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, FlowSDE
from diffalign.errors import UserError
from diffalign.losses.contrast import Contrast
from diffalign.losses.listwise import adaptive_temperature
from diffalign.losses.pairwise import IPO, Logistic, Robust
from diffalign.losses.policy_gradient import kl_estimate
from diffalign.methods import build
from diffalign.methods._common import pair_losses
from diffalign.methods._trailing import Followed, Trail
from diffalign.methods.adpo import ADPO
from diffalign.methods.dgpo import DGPO
from diffalign.methods.diffusion_lpo import DiffusionLPO
from diffalign.methods.diffusion_nft import DiffusionNFT
from diffalign.methods.dmpo import DMPO
from diffalign.methods.dpo import DPO
from diffalign.methods.dro import DRO, rollout
from diffalign.methods.dspo import DSPO
from diffalign.rollout.setting import Window
from diffalign.strategies.fast_slow import FastSlow
from diffalign.strategies.sdpo import SDPO
from diffalign.strategies.weighted import Semantic
from diffalign.types import Batch, Noised
from tests.helpers import VECTORS, Affine, Answers, GivenNoise, GivenTimes, sd_path
from tests.methods.test_dpo_sft import halves, run_on
from tests.methods.test_flow_methods import FLOW, Draws, Times, answers, sampled
from tests.methods.test_lists_and_dynamic_beta import on_lists
from tests.methods.test_lists_errors_experts import GivenStates
from tests.methods.test_recent_methods import drawn, on_likelihoods


def vectors(name, *needed):
    """Return a file of vectors; the test is skipped where a key is not shipped."""
    f = np.load(VECTORS / f"{name}.npz")
    for key in needed:
        if key not in f:
            pytest.skip(f"among the shipped vectors there is no {key} of {name}")
    return f


def close(found, expected, atol=1e-10):
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=atol, rtol=0)


# Diffusion-SDPO's code, with its four losses.

LOSSES = {"diffusion-dpo": DPO(beta=5000), "dspo": DSPO(), "dspo_xl": DSPO(form="sdxl"), "dmpo": DMPO()}


@pytest.mark.parametrize("mu", ["plain", "mu0.9", "mu0.2"])
@pytest.mark.parametrize("name", LOSSES)
def test_golden_losses_of_diffusion_sdpo(name, mu):
    f = vectors("sdpo_dspo_dmpo", f"{name}_{mu}_grad")
    model, reference, target = (torch.from_numpy(f[k]) for k in ("model_pred", "ref_pred", "target"))
    inner = replace(LOSSES[name], time=GivenTimes((0.5,) * 3), noising=GivenNoise(target))
    method = inner if mu == "plain" else SDPO(mu=float(mu[2:])).wrap(inner)
    policy = model.clone().requires_grad_()
    # the strategy reads the target off x_t, so the path at t = 0.5 must give it back
    batch = halves(torch.zeros_like(target), 3)
    step = method(Answers(policy, sd_path()), Answers(reference, sd_path()), batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f[f"{name}_{mu}_loss"]), abs=1e-10)
    if mu == "plain":
        close(policy.grad, f[f"{name}_{mu}_grad"])
        return
    # the target is read off x_t, which costs digits
    assert step.metrics["sdpo/lambda"].item() == pytest.approx(float(f[f"{name}_{mu}_lambda"]), rel=5e-6)
    np.testing.assert_allclose(policy.grad.numpy(), f[f"{name}_{mu}_grad"], rtol=1e-5, atol=1e-11)


def test_dspos_sdxl_form_by_numpy_on_both_sides_of_its_threshold():
    model, reference, target = (x.numpy() for x in drawn())
    errors = lambda x: (x**2).mean(1)  # noqa: E731
    m, r = errors(model - target), errors(reference - target)
    doubt = 1 / (1 + np.exp(-0.5 * 300 * ((m[:3] - m[3:]) - (r[:3] - r[3:]))))
    moved = errors(model - reference)[:3]
    for apart, expected in ((0.1, doubt**2), (1e-6, doubt**2 * moved)):
        method = DSPO(scale=300.0, form="sdxl", apart=apart)
        step, grad = run_on(method, *map(torch.from_numpy, (model, reference, target)))
        assert step.loss.item() == pytest.approx(expected.mean(), abs=1e-14)
        assert grad.abs().max() > 0


# ADPO: temperatures, the anchor's KL, smoothed Plackett-Luce.


@dataclass(frozen=True, kw_only=True)
class Tokens(ADPO):
    """ADPO whose temperatures are those of language: uncertainty is that of tokens."""

    nll: Tensor = torch.zeros(1)
    rewards: Tensor = torch.zeros(1)

    def temperatures(self, reward, score, group):
        entropy = (self.nll.reshape(3, 4).mean(1) / np.log(32000)).clamp(0, 1)
        mean = self.rewards.reshape(3, 4).mean(1)
        return adaptive_temperature(
            self.tau,
            entropy,
            mean if self.by_reward else torch.zeros_like(mean),
            uncertainty=self.uncertainty,
            penalty=self.penalty,
            bounds=(self.low, self.high),
        )


ADPO_CASES = {
    "fixed_tau0.8": {},
    "fixed_tau0.3_br1": {"tau": 0.3, "beta_reward": 1.0},
    "adaptive_R": {"temperature": "adaptive"},
    "adaptive_noR": {"temperature": "adaptive", "by_reward": False},
    "anchorkl0.1": {},
}


@pytest.mark.parametrize("case", ADPO_CASES)
def test_golden_adpo_on_tokens(case):
    """A sample's log-ratio is the sum of its tokens'; the KL of the anchor is a mean over tokens there."""
    f = vectors("adpo", f"{case}_loss", f"{case}_grad")
    tokens = torch.from_numpy(f["log_prob"]).requires_grad_()
    old, mask = torch.from_numpy(f["old_log_prob"]), torch.from_numpy(f["response_mask"]).double()
    ratio = ((tokens - old) * mask).sum(1)
    nll = -((tokens * mask).sum(1) / mask.sum(1)).detach()
    method = Tokens(scale=1.0, nll=nll, rewards=torch.from_numpy(f["rewards"]), **ADPO_CASES[case])
    group = torch.arange(3).repeat_interleave(4)
    step = on_likelihoods(method, ratio, torch.zeros(12).double(), torch.from_numpy(f["advantages"]), group)
    loss = step.loss
    if case.startswith("anchor"):
        estimate = (kl_estimate(tokens - old) * mask).sum() / mask.sum()
        assert estimate.item() == pytest.approx(float(f[f"{case}_m_kl_penalty"]), abs=1e-10)
        loss = loss + 0.1 * estimate
    loss.backward()
    # standardising divides by std + 1e-8 there, by std here
    assert loss.item() == pytest.approx(float(f[f"{case}_loss"]), abs=5e-9)
    close(tokens.grad, f[f"{case}_grad"], 5e-9)
    if "adaptive" in case:
        assert step.metrics["tau"].item() == pytest.approx(float(f[f"{case}_m_mean_tau"]), abs=1e-10)


def test_adpos_own_temperatures_and_anchor_by_numpy():
    """H is the entropy of the list over log K; lists of two sizes; equal means count as the middle."""
    ratio = np.array([0.3, -0.2, 0.5, 0.1, 0.05])
    score = np.array([3.0, 1.0, 2.0, 1.0, 0.0])
    group = np.array([0, 0, 0, 1, 1])
    method = ADPO(scale=1.5, tau=0.8, temperature="adaptive", anchor_kl=0.3)
    policy = torch.from_numpy(ratio).requires_grad_()
    step = on_likelihoods(
        method, policy, torch.zeros(5).double(), torch.from_numpy(score), torch.from_numpy(group)
    )
    losses, taus = [], []
    for g, place in ((0, 1.0), (1, 0.0)):  # means 2 and 0.5
        d, s = 1.5 * ratio[group == g], score[group == g]
        p = np.exp(d / 0.8) / np.exp(d / 0.8).sum()
        h = -(p * np.log(p)).sum() / np.log(len(d))
        tau = np.clip(0.8 * (1 + 0.5 * h + 0.5 * (1 - h) * (1 - place)), 0.05, 5)
        z = (s - s.mean()) / s.std(ddof=1)
        q = np.exp(z / 0.5) / np.exp(z / 0.5).sum()
        losses.append(-(q * (d / tau - np.log(np.exp(d / tau).sum()))).sum())
        taus.append(tau)
    d = 1.5 * ratio
    expected = np.mean(losses) + 0.3 * (np.exp(-d) - 1 + d).mean()
    assert step.loss.item() == pytest.approx(expected, abs=1e-9)
    assert step.metrics["tau"].item() == pytest.approx(np.mean(taus), abs=1e-9)
    equal = adaptive_temperature(
        0.8, torch.zeros(2), torch.ones(2), uncertainty=0.5, penalty=0.5, bounds=(0.05, 5.0)
    )
    assert equal.tolist() == pytest.approx([1.0, 1.0])  # 0.8 (1 + 0.5 / 2)


@pytest.mark.parametrize(
    ("name", "more"),
    [("ls0.1", {"smoothing": 0.1}), ("default", {"smoothing": 0.1, "alpha": 1.0, "top": 3})],
)
def test_golden_smoothed_plackett_luce(name, more):
    f = vectors("adpo", f"pl_{name}_loss")
    step, grad = on_lists(DiffusionLPO(beta=1, positions="mean", **more), f["pl_u"], f["pl_adv"])
    assert step.loss.item() == pytest.approx(float(f[f"pl_{name}_loss"]), abs=1e-10)
    close(grad, f[f"pl_{name}_grad"])


# DGPO and DiffusionNFT.


def test_golden_dgpo():
    f = vectors("dgpo", "loss", "grad")
    assert f["group_size"] == 4 and (f["group"] == np.repeat([0, 1], 4)).all()
    x0 = torch.zeros(8, 4, 8, 8).double()
    # one time; what a network predicts of x0 = 0 is the noise, so the noise of each sample is its target
    noise = torch.from_numpy(f["target_v"]).reshape(2, 1, 4, 4, 8, 8)
    v = torch.from_numpy(f["model_v"]).requires_grad_()
    method = DGPO(
        beta=float(f["beta_dpo"]), reference="base", shared_noise=False, time=Times(((0.5,), (0.5,)))
    )
    batch = sampled(x0, torch.from_numpy(f["advantages"]), torch.from_numpy(f["group"]).long())
    step = method(answers(v), answers(f["ref_v"]), batch, Draws(noise))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    close(v.grad, f["grad"])


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("mode", ["all", "positive_only", "negative_only", "one_only", "binary"])
def test_golden_diffusion_nft(beta, mode):
    key = f"b{beta}_{mode}_"
    f = vectors("diffusion_nft", key + "loss", key + "grad")
    v = torch.from_numpy(f["forward_prediction"]).requires_grad_()
    x0, noise = torch.from_numpy(f["x0"]), torch.from_numpy(f["noise"])
    t = torch.from_numpy(f["t"]).double()
    close(add_noise(answers(v), x0, noise, t), f["xt"], 1e-6)
    reference = Followed(answers(f["ref_forward_prediction"]), answers(f["old_prediction"]))
    method = DiffusionNFT(beta, mode=mode, time=Times(tuple((float(one),) for one in t)))
    batch = sampled(x0, torch.from_numpy(f["advantages"]))
    close(method.share(batch.extra["advantage"]), f[key + "r"], 1e-7)
    step = method(answers(v), reference, batch, Draws(noise[:, None, None]))
    step.loss.backward()
    assert step.metrics["policy_loss"].item() == pytest.approx(float(f[key + "policy_loss"]), rel=1e-6)
    assert step.loss.item() == pytest.approx(float(f[key + "loss"]), rel=1e-6)
    close(v.grad, f[key + "grad"], 1e-8)


# Diffusion-DRO whose rollout is of a policy that is synchronised now and then.


@pytest.mark.parametrize("case", ["main", "bigmargin", "one", "mixed"])
def test_golden_dro_with_a_policy_half(case, monkeypatch):
    """The method itself, given the rollout's states: both halves have a gradient."""
    f = vectors("dro", f"{case}/loss", f"{case}/grad_pred_eps")
    get = lambda name: torch.from_numpy(f[f"{case}/{name}"])  # noqa: E731
    t, count = get("t"), len(f[f"{case}/t"])
    expert_eps, rolled_eps = get("eps_expert"), get("eps_policy")
    x = torch.zeros_like(expert_eps)
    z = Noised(x, expert_eps, x, t / 1000)
    monkeypatch.setattr(
        "diffalign.methods.dro.rollout", lambda *arguments: Noised(x, rolled_eps, x, t / 1000)
    )
    method = DRO(margin=float(f[f"{case}/margin"]), trail=Trail(limit=0.0, every=4), noising=GivenStates(z))
    method = replace(method, time=GivenTimes((0.5,) * count))
    policy = get("pred_eps").clone().requires_grad_()
    reference = Answers(get("pred_eps_ref"), sd_path())
    batch = Batch(x, {}, torch.arange(count), torch.ones(count))
    step = method(Answers(policy, sd_path()), Followed(reference, reference), batch, Streams.at(0, 0, count))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f[f"{case}/loss"]), abs=1e-10)
    close(policy.grad, f[f"{case}/grad_pred_eps"])


def test_a_synchronised_copy_gives_the_loss_of_the_policy_itself():
    """Right after a synchronisation both forms have one loss and one gradient; later they differ."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 4, 4, generator=g, dtype=torch.float64)
    batch = Batch(x, {}, torch.arange(4), torch.ones(4))
    found = []
    for trail, behind in (
        (Trail(limit=0.0), 0.15),
        (Trail(limit=0.0, every=5), 0.15),
        (Trail(0.0, every=5), 0.3),
    ):
        a = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
        make = lambda value: Affine(sd_path(), value, torch.tensor(0.02).double())  # noqa: E731
        base, copy = (make(torch.tensor(v, dtype=torch.float64)) for v in (0.1, behind))
        method = DRO(margin=0.5, steps=5, trail=trail)
        assert method.trails == (trail.every > 1)
        reference = Followed(base, copy) if method.trails else base
        step = method(make(a), reference, batch, Streams.at(0, 0, 4))
        step.loss.backward()
        found.append((step.loss.item(), a.grad.item()))
    assert found[0] == pytest.approx(found[1], abs=1e-12)
    assert abs(found[2][0] - found[0][0]) > 1e-4 and rollout is not None


# The density of Flow-GRPO's CPS steps as released, and the window of Flow-GRPO-Fast.


@pytest.mark.parametrize("level", ["0.7", "0.4"])
def test_golden_squared_density_of_cps(level):
    key = f"cps_nl{level}_"
    f = vectors("flow_grpo_sde_step", key + "logp_fixed", key + "dlogp_dv")
    index, sigmas = torch.from_numpy(f["step_index"]), torch.from_numpy(f["sigmas"])
    v, x = torch.from_numpy(f["v"]).requires_grad_(), torch.from_numpy(f["x_t"])
    kernel = FlowSDE(float(level), "cps", "squared")
    mean, std = kernel(Answers(v, FLOW, "flow"), x, sigmas[index], sigmas[index + 1], {})
    found = log_density(kernel, torch.from_numpy(f[key + "fixed_prev"]), mean, std)
    drawn_steps = std.flatten() > 0  # the step to time 0 is no draw
    expected = torch.where(drawn_steps, torch.from_numpy(f[key + "logp_fixed"]), 0)
    torch.testing.assert_close(found.detach(), expected, atol=1e-6, rtol=1e-6)
    found.sum().backward()
    torch.testing.assert_close(
        v.grad[drawn_steps], torch.from_numpy(f[key + "dlogp_dv"])[drawn_steps], atol=1e-6, rtol=1e-6
    )


def test_a_kernel_without_a_density_of_its_own_is_a_gaussian():
    g = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    std = torch.tensor([[0.5], [0.7], [0.0]]).double()
    expected = step_log_density(x, mean, std)
    for kernel in (DDIM(1.0), FlowSDE(0.7)):
        assert torch.equal(log_density(kernel, x, mean, std), expected)
    squared = log_density(FlowSDE(0.7, density="squared"), x, mean, std)
    close(squared, [*(-((x - mean) ** 2)[:2].mean(1)).tolist(), 0.0])


def test_a_random_window_lies_evenly_within_the_first_steps():
    window = Window(3, order="random", within=5, seed=7)
    starts = [window.steps(number, 9) for number in range(300)]
    assert {w.start for w in starts} == {0, 1, 2} and all(len(w) == 3 for w in starts)
    counts = np.bincount([w.start for w in starts])
    assert counts.min() > 70
    again = Window(3, order="random", within=5, seed=7)
    assert [again.steps(number, 9) for number in range(300)] == starts
    other = Window(3, order="random", within=5, seed=8)
    assert [other.steps(number, 9) for number in range(300)] != starts
    whole = Window(2, order="random")
    assert {whole.steps(number, 4).start for number in range(60)} == {0, 1, 2}


# Losses of margins.


@pytest.mark.parametrize("share", [0.1, 0.3])
@pytest.mark.parametrize(("name", "loss"), [("cdpo", Logistic), ("robust", Robust)])
def test_golden_losses_of_noisy_labels(name, loss, share):
    f = vectors("formula_losses", f"{name}{share}_losses")
    margin = torch.from_numpy(f["margin"]).requires_grad_()
    losses = loss(share)(margin, torch.zeros_like(margin))
    close(losses.detach(), f[f"{name}{share}_losses"])
    losses.mean().backward()
    close(margin.grad, f[f"{name}{share}_grad"])


@pytest.mark.parametrize("alpha", ["1.0", "3.0"])
def test_golden_semantic_weights(alpha):
    f = vectors("formula_losses", f"sem{alpha}_losses")
    margin = torch.from_numpy(f["margin"]).requires_grad_()
    weight = Semantic(alpha=float(alpha))(torch.from_numpy(f["cos_distance"]))
    losses = weight * Logistic()(margin, torch.zeros_like(margin))
    close(losses.detach(), f[f"sem{alpha}_losses"])
    losses.mean().backward()
    close(margin.grad, f[f"sem{alpha}_grad"])


def test_golden_soft_label_pairs():
    """ADPO's pairwise form: the first two of each list, with a soft label."""
    f = vectors("formula_losses", "adpo_pair_losses", "adpo_l")
    policy = torch.from_numpy(f["adpo_l"][:, :2]).clone().requires_grad_()
    one, other = (policy - torch.from_numpy(f["adpo_l_ref"][:, :2])).unbind(1)
    count = torch.arange(3)
    c = Contrast(one, other, one, torch.ones(3).double(), count, count + 3)
    q = torch.from_numpy(f["adpo_pair_q"])
    batch = Batch(policy, {}, count.repeat(2), torch.zeros(6), extra={"votes": torch.cat([q, 1 - q])})
    losses = pair_losses(Logistic(), one, other, c, batch)
    close(losses.detach(), f["adpo_pair_losses"])
    losses.mean().backward()
    close(policy.grad, f["adpo_pair_grad"])


def test_golden_chase_of_two_policies():
    """The slow one's term is subtracted, and neither has a gradient through the other's."""
    f = vectors("formula_losses", "ofs_fast_loss")
    fast, slow = (torch.from_numpy(f[f"ofs_{who}"]).requires_grad_() for who in ("fast", "slow"))
    index = torch.arange(6)
    c = Contrast(fast, fast, fast, torch.ones(6).double(), index, index)
    strategy = FastSlow(weight=float(f["ofs_alpha"]), scale=1.0, limit=10.0)
    ahead, behind = strategy._chase(c, fast - slow.detach()), strategy._chase(c, fast.detach() - slow)
    none = torch.zeros(6).double()
    for who, chase, sign in ((fast, ahead, 1), (slow, behind, -1)):
        name = "fast" if who is fast else "slow"
        loss = Logistic()(who, none).mean() + sign * strategy.weight * chase
        assert loss.item() == pytest.approx(float(f[f"ofs_{name}_loss"]), abs=1e-10)
        (grad,) = torch.autograd.grad(loss, who)
        close(grad, f[f"ofs_{name}_grad"])


def oriented(f):
    first = torch.from_numpy(f["choices"]) == 0
    y1, y2 = (torch.from_numpy(f[f"logp_{y}"]).requires_grad_() for y in ("y1", "y2"))
    r1, r2 = (torch.from_numpy(f[f"ref_{y}"]) for y in ("y1", "y2"))
    gap = (y1 - r1) - (y2 - r2)
    return y1, y2, torch.where(first, gap, -gap)


def test_golden_ipo_and_beta_dpo_of_madpos_code():
    """IPO's target is 1 / (2 beta) on log-ratios; there beta-DPO has a beta for each sample."""
    f = vectors("madpo", "ipo_loss", "betadpo_loss")
    beta = 0.1
    y1, y2, h = oriented(f)
    loss = IPO(beta)(h, torch.zeros_like(h)).mean()
    loss.backward()
    found = [(loss.item(), y1.grad, y2.grad)]
    y1, y2, h = oriented(f)
    loss = Logistic()(torch.from_numpy(f["betadpo_beta"]) * h, torch.zeros_like(h)).mean()
    loss.backward()
    found.append((loss.item(), y1.grad, y2.grad))
    for name, (value, one, two) in zip(("ipo", "betadpo"), found, strict=True):
        assert value == pytest.approx(float(f[f"{name}_loss"]), abs=1e-8)
        close(one, f[f"{name}_grad_y1"], 1e-8)
        close(two, f[f"{name}_grad_y2"], 1e-8)


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"type": "dspo", "form": "sd3"}, "method.form"),
        ({"type": "dspo", "apart": 0}, "method.apart=0"),
        ({"type": "adpo", "low": 3, "high": 1}, "method.low=3.0, high=1.0"),
        ({"type": "adpo", "anchor_kl": -1}, "method.anchor_kl=-1"),
        ({"type": "diffusion_lpo", "smoothing": 1}, "method.smoothing=1"),
        ({"type": "dro", "trail": {"first": 1.0}}, "first=1.0"),
    ],
)
def test_what_is_refused(section, word):
    with pytest.raises(UserError, match=word):
        build(section)
