"""RankDPO, MaPO, PatchDPO and Diffusion-DRO: the released numbers, and the formulas in independent numpy."""

import math
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.pairwise import Hinge
from diffalign.losses.reference_free import ORPO, Paper, Released
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.methods.dro import DRO, rollout
from diffalign.methods.mapo import MaPO
from diffalign.methods.patchdpo import PatchDPO
from diffalign.methods.rankdpo import RankDPO
from diffalign.types import Batch, Noised
from tests.helpers import VECTORS, Affine, Answers, GivenNoise, GivenTimes, sd_path

GOLDEN = VECTORS


def vectors(name, *keys):
    f = np.load(GOLDEN / f"{name}.npz")
    for key in keys:
        if key not in f:
            pytest.skip(f"among the shipped vectors there is no {key}")
    return f


def run_on(method, model, reference, target, group, score, extra=None):
    """Return the public method on given predictions and targets: (step, gradient of the loss)."""
    target = torch.from_numpy(target)
    policy = torch.from_numpy(model).clone().requires_grad_(True)
    group = torch.as_tensor(group)
    times = GivenTimes((0.5,) * (int(group.max()) + 1))
    method = replace(method, time=times, noising=GivenNoise(target))
    batch = Batch(torch.zeros_like(target), {}, group, torch.as_tensor(score), extra=extra or {})
    held = None if reference is None else Answers(torch.from_numpy(reference), sd_path())
    step = method(Answers(policy, sd_path()), held, batch, torch.Generator())
    step.loss.backward()
    return step, policy.grad.numpy()


def check(step, grad, f, prefix, tolerance=1e-10):
    assert step.loss.item() == pytest.approx(float(f[prefix + "loss"]), abs=tolerance)
    np.testing.assert_allclose(grad, f[prefix + "grad"], atol=tolerance)


def errors(prediction, target):
    return ((prediction - target) ** 2).reshape(len(target), -1).mean(1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(count, seed=0):
    """Predictions, references, targets (count, 4, 5, 5) near each other."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(count, 4, 5, 5))
    return target + 0.4 * rng.normal(size=target.shape), target + 0.4 * rng.normal(size=target.shape), target


# --- RankDPO


@pytest.mark.parametrize("base", ["loss", "loss_log2"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", ["k4", "k2", "k3", "ties"])
def test_golden_rankdpo(case, reduction, base):
    """Their beta has no 1/2; of summed errors it counts D times."""
    prefix = f"{case}/{reduction}/"
    f = vectors("rankdpo", prefix + base)
    pixels = f[f"{case}/eps"][0].size if reduction == "sum" else 1
    method = RankDPO(beta=2 * float(f[prefix + "beta"]) * pixels, log_base=2 if "log2" in base else math.e)
    phi = f[f"{case}/phi"]
    step, grad = run_on(
        method, f[f"{case}/pred"], f[f"{case}/ref"], f[f"{case}/eps"], np.zeros(len(phi), int), phi
    )
    assert step.loss.item() == pytest.approx(float(f[prefix + base]), abs=1e-10)
    if base == "loss":
        np.testing.assert_allclose(grad, f[prefix + "grad_pred"], atol=1e-10)


@pytest.mark.parametrize("base", [math.e, 2.0])
def test_rankdpo_against_numpy(base):
    """Two lists of four, one with a tie, in a shuffled order; beta 10 in the paper's unit."""
    order = np.random.default_rng(5).permutation(8)
    model, reference, target = drawn(8)
    phi = np.array([0.8, 0.2, 0.2, 0.4, 0.1, 0.9, 0.3, 0.5])[order]
    group = np.repeat([0, 1], 4)[order]
    s = errors(model, target) - errors(reference, target)
    loss, slope = 0.0, np.zeros(8)
    for i, j in permutations(range(8), 2):
        if group[i] != group[j] or phi[i] <= phi[j]:
            continue
        rank = lambda k: sum(  # noqa: E731
            group[n] == group[k] and (phi[n] > phi[k] or (phi[n] == phi[k] and n <= k)) for n in range(8)
        )
        d = [math.log(base) / math.log(1 + rank(k)) for k in (i, j)]
        w = abs(2 ** phi[i] - 2 ** phi[j]) * abs(d[0] - d[1])
        p = sigmoid(-10 * (s[i] - s[j]))
        loss += -w * math.log(p) / 2
        slope[i] += 10 * w * (1 - p) / 2
        slope[j] -= 10 * w * (1 - p) / 2
    method = RankDPO(beta=20, log_base=base)
    step, grad = run_on(method, model, reference, target, group, phi)
    assert step.loss.item() == pytest.approx(loss, abs=1e-12) and step.weight.item() == 2
    np.testing.assert_allclose(grad, slope[:, None, None, None] * 2 * (model - target) / 100, atol=1e-12)


def test_a_list_of_ties_counts_nothing():
    model, reference, target = drawn(6)
    group, phi = np.repeat([0, 1], 3), np.array([0.5, 0.5, 0.5, 0.1, 0.9, 0.2])
    both, grad = run_on(RankDPO(beta=20), model, reference, target, group, phi)
    one, _ = run_on(RankDPO(beta=20), model[3:], reference[3:], target[3:], np.zeros(3, int), phi[3:])
    assert both.weight.item() == 1 and not grad[:3].any()
    assert both.loss.item() == pytest.approx(one.loss.item(), abs=1e-12)


def test_rankdpo_of_pairs_is_weighted_dpo():
    """Two images scored 1 and 0: weight (2 - 1) (1 / ln 2 - 1 / ln 3) on the loss of DPO."""
    model, reference, target = drawn(4)
    group, score = np.repeat([0, 1], 2), np.array([1.0, 0, 0, 1])
    ranked, grad = run_on(RankDPO(beta=20), model, reference, target, group, score)
    dpo, wanted = run_on(DPO(beta=20), model, reference, target, group, score)
    weight = 1 / math.log(2) - 1 / math.log(3)
    assert ranked.loss.item() == pytest.approx(weight * dpo.loss.item(), abs=1e-12)
    np.testing.assert_allclose(grad, weight * wanted, atol=1e-12)


# --- MaPO


@pytest.mark.parametrize("beta", ["0.1", "0.25"])
@pytest.mark.parametrize("snr", ["0.5", "0.1"])
@pytest.mark.parametrize("which", ["near", "far"])
def test_golden_mapo(which, snr, beta):
    prefix = f"{which}_snr{snr}_b{beta}_"
    f = vectors("mapo", prefix + "loss", prefix + "grad", f"pred_{which}")
    method = MaPO(form=Released(beta=float(beta), snr=float(snr)))
    group, score = np.tile(np.arange(4), 2), np.repeat([1.0, 0.0], 4)
    step, grad = run_on(method, f[f"pred_{which}"], None, f["target"], group, score)
    check(step, grad, f, prefix)


@pytest.mark.parametrize("which", ["near", "far"])
def test_golden_mapo_orpo(which):
    f = vectors("mapo", f"{which}_orpo_loss", f"{which}_orpo_grad", f"pred_{which}")
    group, score = np.tile(np.arange(4), 2), np.repeat([1.0, 0.0], 4)
    step, grad = run_on(MaPO(form=ORPO(sign="released")), f[f"pred_{which}"], None, f["target"], group, score)
    check(step, grad, f, f"{which}_orpo_")


def test_golden_mapo_and_orpo_beside_dpo():
    """Computed in float32 by the scripts."""
    f = vectors("diffusion_dpo", "mapo_loss", "mapo_grad_model_pred", "hf_orpo_b0p1_loss")
    group, score = np.tile(np.arange(4), 2), np.repeat([1.0, 0.0], 4)
    step, grad = run_on(MaPO(), f["mapo_model_pred"], None, f["target"], group, score)
    assert step.loss.item() == pytest.approx(float(f["mapo_loss"]), rel=1e-5)
    np.testing.assert_allclose(grad, f["mapo_grad_model_pred"], atol=1e-5)
    step, _ = run_on(MaPO(form=ORPO(sign="released")), f["model_pred"], None, f["target"], group, score)
    assert step.loss.item() == pytest.approx(float(f["hf_orpo_b0p1_loss"]), rel=1e-5)


@pytest.mark.parametrize("beta", [1, 8, 64])
def test_golden_mapo_as_printed(beta):
    """Losses with the fine-tuning term; whether gradients are of their mean or sum the file does not say."""
    f = vectors("formula_losses", "mapo_paper_lw", f"mapo_paper_b{beta}_losses")
    won, lost = (torch.from_numpy(f[f"mapo_paper_{k}"]).requires_grad_(True) for k in ("lw", "ll"))
    losses = Paper(beta=beta)(won, lost)
    np.testing.assert_allclose(losses.detach().numpy(), f[f"mapo_paper_b{beta}_losses"], atol=1e-10)
    losses.sum().backward()
    got = np.stack([won.grad.numpy(), lost.grad.numpy()])
    wanted = np.stack([f[f"mapo_paper_b{beta}_grad_lw"], f[f"mapo_paper_b{beta}_grad_ll"]])
    assert any(np.allclose(got / n, wanted, atol=1e-10, rtol=0) for n in (1, len(won)))


def test_mapo_against_numpy():
    model, _, target = drawn(6)
    group, score = np.tile(np.arange(3), 2), np.repeat([1.0, 0.0], 3)
    m = errors(model, target)
    phi = lambda x: 0.5 * x / np.expm1(0.5 * x)  # noqa: E731
    k = 0.5 * m
    slope = 0.5 * (np.expm1(k) - k * np.exp(k)) / np.expm1(k) ** 2  # phi'
    z = 1000 * (phi(m[:3]) - phi(m[3:]))
    pull = 0.1 * sigmoid(-z) * 1000 / 3
    weight = np.concatenate([1 / 3 - pull * slope[:3], pull * slope[3:]])
    step, grad = run_on(MaPO(), model, None, target, group, score)
    assert step.loss.item() == pytest.approx((m[:3] + 0.1 * np.log1p(np.exp(-z))).mean(), rel=1e-10)
    np.testing.assert_allclose(grad, weight[:, None, None, None] * 2 * (model - target) / 100, atol=1e-10)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx((m[:3] < m[3:]).mean())
    assert step.metrics["denoising/chosen"].item() == pytest.approx(m[:3].mean())


def test_mapo_is_about_a_dpo_without_reference_near_zero():
    """Its logit is 250 (m_l - m_w) to first order: that of DPO at beta 500 with errors of 0 for reference."""
    target = np.zeros((2, 4, 5, 5))
    model = np.concatenate([np.full((1, 4, 5, 5), 0.010), np.full((1, 4, 5, 5), 0.012)])
    score = np.array([1.0, 0.0])
    mapo, _ = run_on(MaPO(), model, None, target, np.zeros(2, int), score)
    dpo, _ = run_on(DPO(beta=500), model, target, target, np.zeros(2, int), score)
    assert mapo.metrics["rewards/margins"].item() == pytest.approx(
        dpo.metrics["rewards/margins"].item(), rel=1e-3
    )


def test_mapo_ties_count_nothing_and_all_ties_are_nothing():
    model, _, target = drawn(4)
    group = np.repeat([0, 1], 2)
    step, grad = run_on(MaPO(), model, None, target, group, np.array([1.0, 0, 0.5, 0.5]))
    assert step.weight.item() == 1 and not grad[2:].any()
    step, grad = run_on(MaPO(), model, None, target, group, np.full(4, 0.5))
    assert step.weight.item() == 0 and not grad.any()


# --- PatchDPO


def test_golden_patch_dpo():
    f = vectors("patch_dpo", "loss", "grad")
    maps = torch.from_numpy(np.concatenate([f["target_rmap"], f["contra_rmap"]])[:, None])
    group, score = np.array([0, 1, 0, 1]), np.array([1.0, 1, 0, 0])
    step, grad = run_on(PatchDPO(), f["noise_pred"], None, f["noise"], group, score, {"patches": maps})
    check(step, grad, f, "")


def test_patch_dpo_against_numpy():
    model, _, target = drawn(4)
    maps = np.random.default_rng(1).random((4, 1, 5, 5))
    score = np.array([0.0, 1, 1, 0])
    weights = np.where(score[:, None, None, None] == 1, 1 - maps, maps)
    step, grad = run_on(
        PatchDPO(), model, None, target, np.array([0, 0, 1, 1]), score, {"patches": torch.from_numpy(maps)}
    )
    assert step.loss.item() == pytest.approx((weights * (model - target) ** 2).mean(), abs=1e-12)
    np.testing.assert_allclose(grad, 2 * weights * (model - target) / 400, atol=1e-12)
    assert step.weight.item() == 4


def test_patch_dpo_shares_time_and_noise_in_a_pair():
    """Equal images under equal maps have equal errors: a pair's loss is that of either image."""
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = torch.full((4, 1, 4, 4), 0.5, dtype=torch.float64)
    twice = Batch(x.repeat_interleave(2, 0), {}, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0]))
    twice = replace(twice, extra={"patches": maps})
    once = Batch(x, {}, torch.arange(2), torch.ones(2), extra={"patches": maps[:2]})
    policy = affine(0.3)
    losses = [PatchDPO()(policy, policy, b, Streams.at(0, 0, 2)).loss.item() for b in (twice, once)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-15)


@pytest.mark.parametrize(
    ("extra", "words"),
    [({}, "no maps"), ({"patches": torch.zeros(2, 5, 5)}, r"maps of shape \(2, 5, 5\).*\(2, 1, 5, 5\)")],
)
def test_patch_dpo_without_maps_says_so(extra, words):
    model, _, target = drawn(2)
    with pytest.raises(UserError, match=words):
        run_on(PatchDPO(), model, None, target, np.zeros(2, int), np.array([1.0, 0.0]), extra)


# --- Diffusion-DRO


def affine(a, b=0.02):
    return Affine(sd_path(), torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


@dataclass(frozen=True, eq=False)
class GivenStates:
    """A noising that gives the states it was made with."""

    z: Noised
    by: str = "policy"
    guidance: float = 1.0

    def __call__(self, denoiser, x0, t, cond, group, generator):
        return self.z


@pytest.mark.parametrize("case", ["main", "bigmargin", "sync", "one", "mixed"])
def test_golden_dro(case):
    """The general loss, in which the rollout's network need not be the trained one, is DPO with a hinge: the
    gate is ``margin`` times a hinge of logit (2 / margin) (ratio_E - ratio_P).
    """
    f = vectors("dro", f"{case}/loss", f"{case}/grad_pred_eps")
    count, margin = len(f[f"{case}/t"]), float(f[f"{case}/margin"])
    target = np.concatenate([f[f"{case}/eps_expert"], f[f"{case}/eps_policy"]])
    group, score = np.tile(np.arange(count), 2), np.repeat([1.0, 0.0], count)
    method = DPO(beta=2 / margin, loss=Hinge())
    step, grad = run_on(method, f[f"{case}/pred_eps"], f[f"{case}/pred_eps_ref"], target, group, score)
    assert margin * step.loss.item() == pytest.approx(float(f[f"{case}/loss"]), abs=1e-10)
    np.testing.assert_allclose(margin * grad, f[f"{case}/grad_pred_eps"], atol=1e-10)


def experts(count=6):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, 4, 4, generator=g, dtype=torch.float64)
    text = torch.randn(count, 2, generator=g, dtype=torch.float64) / 5
    return Batch(x, {"text": text}, torch.arange(count), torch.ones(count))


@pytest.mark.parametrize("margin", [0.001, -0.02])
def test_dro_is_the_general_loss_with_both_halves_run(margin):
    """The method, which does not run the rollout's half, against both halves with gradient: same loss, same
    gradient. A negative margin closes some gates.
    """
    batch, times = experts(), GivenTimes((0.05, 0.951, 0.3, 0.7, 0.999, 0.0))
    eps = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    method = DRO(margin=margin, time=times, noising=GivenNoise(eps))
    results = []
    for general in (False, True):
        a = torch.tensor(0.15, dtype=torch.float64, requires_grad=True)
        policy = Affine(sd_path(), a, torch.tensor(0.02, dtype=torch.float64))
        reference, streams = affine(0.1), Streams.at(0, 0, 6)
        if general:
            noise = streams.normal(6, (3, 4, 4)).double()
            t = times(6, None)
            x_e = add_noise(policy, batch.x, eps, t)
            rolled = rollout(policy, noise, t, batch.cond, 20)
            mse = lambda d, x, y, t=t: ((d(x, t, batch.cond) - y) ** 2).flatten(1).mean(1)  # noqa: E731
            diff = mse(policy, x_e, eps) - mse(reference, x_e, eps).detach()
            diff = diff - (mse(policy, rolled.x_t, rolled.eps) - mse(reference, rolled.x_t, rolled.eps))
            losses = torch.relu(diff + margin)
            assert margin > 0 or 0 < (losses > 0).sum() < 6
            loss = losses.mean()
        else:
            step = method(policy, reference, batch, streams)
            loss = step.loss
            assert step.weight.item() == 6
        loss.backward()
        results.append((loss.item(), a.grad.item()))
    assert results[0] == pytest.approx(results[1], abs=1e-12)


def test_a_rollout_passes_the_time_on_the_grid_of_its_perturbation():
    """t = 50 k + u over 1000 is row 19 - k of the rollout perturbed by u; the rows above are 50 apart, below
    1000.
    """
    seen = []

    class Watched(Affine):
        def __call__(self, x_t, t, cond):
            seen.append((t * 1000).round().int().tolist())
            return super().__call__(x_t, t, cond)

    policy = Watched(sd_path(), torch.tensor(0.1), torch.tensor(0.02))
    t = torch.tensor([0.999, 0.95, 0.949, 0.8, 0.0])  # float32, as a run has them
    x = torch.randn(5, 2, 2, generator=torch.Generator().manual_seed(0))
    z = rollout(policy, x, t, {}, 20)
    assert seen[:4] == [[999, 950, 999, 950, 950], [949, 900, 900], [850, 850], [800, 800]]
    assert seen[4:] == [[v] for v in range(750, -1, -50)]
    torch.testing.assert_close(z.t, t, atol=1e-6, rtol=0)
    assert torch.equal(z.x_t[:2], x[:2])  # the first row is the noise itself
    x0, eps = clean_and_noise(policy, z.x_t, z.t, {})
    torch.testing.assert_close(z.eps, eps)
    torch.testing.assert_close(z.x0, x0)


def test_dro_learns_from_winners_of_groups_and_not_from_ties():
    batch = experts()
    ranked = replace(
        batch, group=torch.tensor([0, 0, 1, 1, 2, 2]), score=torch.tensor([0.1, 0.9, 1, 0, 0.5, 0.5])
    )
    step = DRO()(affine(0.15), affine(0.1), ranked, Streams.at(0, 0, 3))
    alone = DRO()(affine(0.15), affine(0.1), batch.select(torch.tensor([1, 2])), Streams.at(0, 0, 2))
    assert step.weight.item() == 2
    assert step.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)


def test_dro_at_the_reference_has_the_margin_for_its_loss():
    step = DRO(margin=0.004)(affine(0.1), affine(0.1), experts(), Streams.at(0, 0, 6))
    assert step.loss.item() == pytest.approx(0.004, abs=1e-12) and step.metrics["drift"].item() == 0.0


# --- settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "rankdpo", "log_base": 1}, "method.log_base=1.0"),
        ({"type": "rankdpo", "beta": 0}, "method.beta=0.0"),
        ({"type": "mapo", "form": "papers"}, "type of method.form.*did you mean paper"),
        ({"type": "mapo", "form": {"type": "released", "snr": -1}}, "form.snr=-1"),
        ({"type": "dro", "steps": 0}, "method.steps=0"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_build_from_a_mapping():
    assert build({"type": "mapo", "form": {"type": "paper", "beta": 32}}) == MaPO(form=Paper(beta=32))
    assert build({"type": "dro", "time": {"type": "uniform", "low": 0.3}}) == DRO(time=Uniform(low=0.3))
    assert build({"type": "rankdpo", "log_base": 2}) == RankDPO(log_base=2.0)
