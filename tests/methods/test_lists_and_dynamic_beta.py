"""Diffusion-LPO and beta-DPO: reference implementations, independent arithmetic, identities."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.losses.pairwise import Poly
from diffalign.methods import build
from diffalign.methods.beta_dpo import BetaDPO, Gaps
from diffalign.methods.diffusion_lpo import DiffusionLPO
from diffalign.methods.dpo import DPO
from diffalign.types import Stateful
from tests.helpers import VECTORS
from tests.methods.test_recent_methods import on_likelihoods


def case_of(name, case):
    """Return the arrays of one case by name; the test is skipped where it is not shipped."""
    f = np.load(VECTORS / f"{name}.npz")
    found = {key.removeprefix(f"{case}_a_"): f[key] for key in f if key.startswith(f"{case}_a_")}
    if not found:
        pytest.skip(f"among the shipped vectors there is no {case} of {name}")
    return found


def on_lists(method, reward, score):
    """Run the method on lists (L, K) of log-ratios: (step, gradient (L, K))."""
    policy = torch.from_numpy(reward.flatten()).clone().requires_grad_()
    group = torch.arange(len(reward)).repeat_interleave(reward.shape[1])
    step = on_likelihoods(
        method, policy, torch.zeros_like(policy).detach(), torch.from_numpy(score.flatten()), group
    )
    step.loss.backward()
    return step, policy.grad.numpy().reshape(reward.shape)


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_plackett_luce(case):
    f = case_of("plackett_luce_formula", case)
    s = f["score_best_first"]
    step, grad = on_lists(DiffusionLPO(beta=1), s, np.tile(-np.arange(s.shape[1], dtype=float), (len(s), 1)))
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10) and step.weight == len(s)
    np.testing.assert_allclose(grad, f["grad"], atol=1e-10)


@pytest.mark.parametrize(("name", "more"), [("plain", {}), ("poly1", {"alpha": 1.0}), ("top2", {"top": 2})])
def test_golden_adpo_plackett_luce(name, more):
    f = np.load(VECTORS / "adpo.npz")
    if f"pl_{name}_loss" not in f:
        pytest.skip(f"among the shipped vectors there is no pl_{name} of adpo")
    step, grad = on_lists(DiffusionLPO(beta=1, positions="mean", **more), f["pl_u"], f["pl_adv"])
    assert step.loss.item() == pytest.approx(float(f[f"pl_{name}_loss"]), abs=1e-10)
    np.testing.assert_allclose(grad, f[f"pl_{name}_grad"], atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_list_of_two_is_dpo_or_poly_dpo(alpha):
    g = np.random.default_rng(0)
    reward, score = g.normal(size=(3, 2)), np.array([[1.0, 0], [0, 1], [0.5, 0.5]])
    one, grad = on_lists(DiffusionLPO(beta=3, alpha=alpha), reward, score)
    other, expected = on_lists(DPO(beta=3, loss=Poly(alpha)), reward, score)
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-12) and one.weight == other.weight == 2
    np.testing.assert_allclose(grad, expected, atol=1e-12)


def test_equal_scores_in_a_list_do_not_compete_in_any_order():
    """By hand: two equal winners each before the two below, one shift of all rewards changing nothing."""
    s = np.array([[0.3, -0.2, 0.1, 0.7]])
    score = np.array([[2.0, 2, 1, 0]])
    step, grad = on_lists(DiffusionLPO(beta=1), s, score)
    log_sum = lambda *values: float(np.log(np.exp(values).sum()))  # noqa: E731
    by_hand = [log_sum(0.3, 0.1, 0.7) - 0.3, log_sum(-0.2, 0.1, 0.7) + 0.2, log_sum(0.1, 0.7) - 0.1]
    assert step.loss.item() == pytest.approx(sum(by_hand), abs=1e-12)
    order = [1, 0, 2, 3]
    swapped, other = on_lists(DiffusionLPO(beta=1), s[:, order], score[:, order])
    assert swapped.loss.item() == pytest.approx(step.loss.item(), abs=1e-12)
    np.testing.assert_allclose(other[:, order], grad, atol=1e-12)
    assert on_lists(DiffusionLPO(beta=1), s + 0.4, score)[0].loss.item() == pytest.approx(step.loss.item())
    assert on_lists(DiffusionLPO(beta=1), s, np.ones_like(s))[0].weight == 0


@dataclass(frozen=True, kw_only=True)
class Given(BetaDPO):
    """beta-DPO with the selection of a reference implementation."""

    mask: Tensor | None = None

    def selected(self, gap, c, batch, generator):
        return self.mask.to(gap)


class Held(Gaps):
    def update(self, gap, weight, decay):
        """Statistics are those that were given."""


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_beta_dpo(case):
    f = case_of("beta_dpo", case)
    held = Held()
    method = Given(
        scale=1, beta=float(f["beta0"]), sensitivity=float(f["a"]), filter=float(f["filter"]),
        gaps=held, mask=torch.from_numpy(f["mask"]),
    )  # fmt: skip
    method.load_state_dict({"mean": f["gap_mean"].item(), "std": f["gap_std"].item()})
    # the stand-in network needs log-probabilities below a bound; only differences count
    at = lambda who: torch.from_numpy(np.concatenate([f[f"{who}_w"], f[f"{who}_l"]])) - 20  # noqa: E731
    policy = at("pi").requires_grad_()
    step = on_likelihoods(method, policy, at("ref"))
    step.loss.backward()
    assert step.metrics["beta"].item() == pytest.approx(f["beta_used"].item(), abs=1e-10)
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    assert step.weight.item() == f["mask"].sum()
    np.testing.assert_allclose(
        policy.grad.numpy(), np.concatenate([f["grad_pi_w"], f["grad_pi_l"]]), atol=1e-10
    )


def test_beta_dpo_follows_its_statistics_by_numpy():
    """Three batches without a filter: M of the decayed means, S of the decayed deviations."""
    method, zero = BetaDPO(scale=2, beta=0.1, filter=0, decay=0.8), torch.zeros(6, dtype=torch.float64)
    mean = None
    for seed in range(3):
        policy = torch.from_numpy(np.random.default_rng(seed).normal(seed, 1, 6)) * 0.5
        gap = 2 * (policy[:3] - policy[3:]).numpy()
        mean = gap.mean() if mean is None else 0.8 * mean + 0.2 * gap.mean()
        step = on_likelihoods(method, policy, zero)
        beta = max(1e-3, 0.1 * (1 + 0.6 * (gap.mean() - mean)))
        assert step.metrics["beta"].item() == pytest.approx(beta, abs=1e-12)
        assert step.loss.item() == pytest.approx(np.log1p(np.exp(-beta * gap)).mean(), abs=1e-12)
    assert method.gaps.mean.item() == pytest.approx(mean, abs=1e-12)


def test_beta_dpo_draws_by_the_bell_of_the_gaps():
    """One pair far out beside seven usual ones, two left out: it is, nearly always, and a usual one."""
    method = BetaDPO(scale=1, filter=0.25)
    method.load_state_dict({"mean": 0.0, "std": 0.5})
    gaps = torch.tensor([0.1, -0.1, 0.2, 3.0, 0.0, -0.2, 0.1, 0.3], dtype=torch.float64)
    times = torch.zeros(8)
    for seed in range(200):
        c, batch = pairs_with(gaps)
        mask = method.selected(gaps, c, batch, torch.Generator().manual_seed(seed))
        assert mask.sum() == 6
        times += mask
    assert times[3] < 2 and times.sort().values[1] > 120


def pairs_with(gaps):
    from diffalign.losses.contrast import contrast
    from diffalign.types import Batch

    group = torch.arange(len(gaps)).repeat_interleave(2)
    score = torch.tensor([1.0, 0.0] * len(gaps))
    log_ratio = torch.stack([gaps, torch.zeros_like(gaps)], 1).flatten()
    return contrast(log_ratio, score, group), Batch(log_ratio[:, None], {}, group, score)


def test_beta_dpo_keeps_its_state_and_starts_with_all_pairs_alike():
    method, zero = BetaDPO(scale=1), torch.zeros(10, dtype=torch.float64)
    assert isinstance(method, Stateful) and method.state_dict() == {}
    step = on_likelihoods(method, zero, zero)  # nothing has moved: no statistics, yet a selection
    assert step.weight == 4 and method.state_dict() == {} and step.metrics["beta"].item() == 0.1
    policy = torch.from_numpy(np.random.default_rng(0).normal(size=10))
    with torch.no_grad():
        assert on_likelihoods(method, policy, zero).weight == 5
    assert method.state_dict() == {}
    on_likelihoods(method, policy, zero)
    again = BetaDPO()
    again.load_state_dict(method.state_dict())
    assert again.state_dict() == method.state_dict() and again.gaps.std > 0


@pytest.mark.parametrize(
    ("section", "word"),
    [
        ({"type": "diffusion_lpo", "top": 0}, "method.top=0"),
        ({"type": "diffusion_lpo", "alpha": -2}, "method.alpha=-2"),
        ({"type": "beta_dpo", "filter": 1}, "method.filter=1"),
        ({"type": "beta_dpo", "scale": 0}, "method.scale=0"),
        ({"type": "beta_dpo", "sensitivity": -1}, "method.sensitivity=-1"),
    ],
)
def test_bad_settings_are_named(section, word):
    with pytest.raises(UserError, match=word):
        build(section)
