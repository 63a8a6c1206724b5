"""Diffusion-KTO, TKTO and TDPO: the released numbers, and the formulas in independent numpy."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.diffusion.paths import VariancePreserving
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.losses.clipping import Clamp, Stop
from diffalign.losses.pointwise import LossAverse, RiskSeeking1, RiskSeeking2, RiskSeeking3, Sigmoid
from diffalign.methods import build
from diffalign.methods._likes import other_prompts
from diffalign.methods.dpo import DPO
from diffalign.methods.kto import KTO
from diffalign.methods.tdpo import TDPO
from diffalign.methods.tkto import TKTO
from diffalign.types import Batch
from tests.helpers import VECTORS, Affine, Answers, GivenNoise, GivenTimes, sd_path

GOLDEN = VECTORS


@dataclass
class ByPrompt:
    """Fixed predictions: ``own`` under a sample's own prompt, ``rolled`` under another one."""

    own: Tensor
    rolled: Tensor
    path: VariancePreserving
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        same = cond["prompt"] == torch.arange(len(x_t))
        assert same.all() or not same.any()
        return self.own if same.all() else self.rolled


def vectors(name):
    return np.load(GOLDEN / f"{name}.npz")


def need(f, *keys):
    for key in keys:
        if key not in f:
            pytest.skip(f"among the shipped vectors there is no {key}")


def run_on(method, model, reference, target, group, score, rolled=None):
    """Return the public method on given predictions and targets: (step, gradient of the loss)."""
    arrays = [torch.from_numpy(np.asarray(a)) for a in (model, reference, target)]
    policy = arrays[0].clone().requires_grad_(True)
    group = torch.as_tensor(group)
    times = GivenTimes((0.5,) * (int(group.max()) + 1))
    method = replace(method, time=times, noising=GivenNoise(arrays[2]))
    batch = Batch(
        torch.zeros_like(policy),
        {"prompt": torch.arange(len(group))},
        group,
        torch.as_tensor(score, dtype=torch.float64),
    )
    if rolled is None:
        denoisers = Answers(policy, sd_path()), Answers(arrays[1], sd_path())
    else:
        denoisers = tuple(
            ByPrompt(p, torch.from_numpy(r), sd_path())
            for p, r in zip((policy, arrays[1]), rolled, strict=True)
        )
    step = method(*denoisers, batch, torch.Generator())
    step.loss.backward()
    return step, policy.grad.numpy()


def check(step, grad, f, prefix, tolerance=1e-10):
    assert step.loss.item() == pytest.approx(float(f[prefix + "loss"]), abs=tolerance)
    np.testing.assert_allclose(grad, f[prefix + "grad"], atol=tolerance)


# Their beta has no 1/2: ours is twice theirs.
KTO_CASES = {
    "sigmoid_": KTO(beta=2000),
    "poskl_": KTO(beta=2000),
    "loss_averse_": KTO(beta=2000, utility=LossAverse()),
    "risk_seeking_1_": KTO(beta=2000, utility=RiskSeeking1()),
    "risk_seeking_2_": KTO(beta=2000, utility=RiskSeeking2()),
    "risk_seeking_3_": KTO(beta=2000, utility=RiskSeeking3()),
    "bce_sigmoid_": KTO(beta=2000, kl="class_means"),
    "bce_original_": KTO(beta=2000, kl="mismatched"),
    "b5000_ld1.3_lu0.7_": KTO(beta=10000, desirable_weight=1.3, undesirable_weight=0.7),
}


@pytest.mark.parametrize("prefix", KTO_CASES)
def test_golden_kto(prefix):
    f = vectors("diffusion_kto")
    need(f, prefix + "loss", prefix + "grad")
    rolled = None
    if prefix == "bce_original_":
        need(f, "model_pred_roll", "ref_pred_roll")
        rolled = (f["model_pred_roll"], f["ref_pred_roll"])
    model = f["poskl_model_pred" if prefix == "poskl_" else "model_pred"]
    method = KTO_CASES[prefix]
    step, grad = run_on(method, model, f["ref_pred"], f["target"], np.arange(6), f["labels"], rolled)
    check(step, grad, f, prefix)
    if prefix + "kl" in f:
        assert step.metrics["kl"].item() / (method.beta / 2) == pytest.approx(
            float(f[prefix + "kl"]), abs=1e-12
        )


def test_golden_tkto():
    f = vectors("tkto")
    group = np.array([0, 1, 2, 0, 1, 2])
    step, grad = run_on(TKTO(beta=2000), f["model_pred"], f["ref_pred"], f["noise"], group, f["labels"])
    check(step, grad, f, "")


@pytest.mark.parametrize("beta", [500, 2000, 5000])
def test_golden_tdpo(beta):
    f = vectors("tdpo")
    need(f, f"b{beta}_loss", f"b{beta}_grad")
    group, score = np.tile(np.arange(4), 2), np.repeat([1.0, 0.0], 4)
    step, grad = run_on(TDPO(beta=beta), f["model_pred"], f["ref_pred"], f["noise"], group, score)
    check(step, grad, f, f"b{beta}_")
    if f"b{beta}_inside" in f:
        assert step.metrics["rewards/margins"].item() == pytest.approx(f[f"b{beta}_inside"].mean(), abs=1e-10)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


# utility h(v, y) and dh/dv, written out again
HALOS = {
    "sigmoid": (Sigmoid(), lambda v, y: sigmoid(y * v), lambda v, y: y * sigmoid(v) * sigmoid(-v)),
    "loss_averse": (LossAverse(), lambda v, y: log_sigmoid(y * v), lambda v, y: y * sigmoid(-y * v)),
    "risk_seeking_1": (RiskSeeking1(), lambda v, y: -y * log_sigmoid(-v), lambda v, y: y * sigmoid(v)),
    "risk_seeking_2": (
        RiskSeeking2(),
        lambda v, y: y * np.exp(v / 100) - 1,
        lambda v, y: y * np.exp(v / 100) / 100,
    ),
    "risk_seeking_3": (RiskSeeking3(), lambda v, y: -log_sigmoid(-y * v), lambda v, y: y * sigmoid(y * v)),
}
LABELS = np.array([1, 0, 1, 1, 0, 0])


def drawn(seed=0, worse=0.0):
    """Predictions, references, targets (6, 4, 5, 5) near each other; ``worse`` moves the reference away."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(6, 4, 5, 5))
    reference = target + (0.4 + worse) * rng.normal(size=target.shape)
    model = target + 0.4 * rng.normal(size=target.shape)
    return model, reference, target


def improvement(model, reference, target):
    mse = lambda p: ((p - target) ** 2).reshape(len(target), -1).mean(1)  # noqa: E731
    return mse(reference) - mse(model)


@pytest.mark.parametrize("name", HALOS)
@pytest.mark.parametrize("worse", [0.0, 0.1])
def test_kto_against_numpy(name, worse):
    """Their formula with beta 10: z = 10 y (g - kl), both class weights, gradient by hand; kl without
    gradient, positive only where the policy is better than the reference.
    """
    utility, halo, slope = HALOS[name]
    model, reference, target = drawn(worse=worse)
    g, y = improvement(model, reference, target), 2 * LABELS - 1
    kl = max(g.mean(), 0)
    assert (kl > 0) == (worse > 0)
    w, v = np.where(y > 0, 1.3, 0.7), 10 * (g - kl)
    dg = -2 * (model - target) / 100
    wanted = -(w * slope(v, y) * 10 / 6)[:, None, None, None] * dg
    method = KTO(beta=20, utility=utility, desirable_weight=1.3, undesirable_weight=0.7)
    step, grad = run_on(method, model, reference, target, np.arange(6), LABELS)
    assert step.loss.item() == pytest.approx((w * (1 - halo(v, y))).mean(), abs=1e-12)
    np.testing.assert_allclose(grad, wanted, atol=1e-12)
    assert step.metrics["kl"].item() == pytest.approx(10 * kl, abs=1e-12)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx((y * v > 0).mean())
    assert step.metrics["errors/chosen"].item() == pytest.approx(-g[y > 0].mean())
    assert step.weight.item() == 6


def test_kto_offsets_against_numpy():
    model, reference, target = drawn()
    rolled = drawn(seed=1)[:2]
    g, y = improvement(model, reference, target), 2 * LABELS - 1
    classes = (g[y > 0].mean() + g[y < 0].mean()) / 2
    mismatched = improvement(*rolled, target).mean()
    assert mismatched != 0 and classes < 0  # neither is clamped
    for kind, kl in (("class_means", classes), ("mismatched", mismatched)):
        step, grad = run_on(
            KTO(beta=20, kl=kind), model, reference, target, np.arange(6), LABELS, rolled=rolled
        )
        h = sigmoid(10 * y * (g - kl))
        assert step.loss.item() == pytest.approx((1 - h).mean(), abs=1e-12)
        wanted = (h * (1 - h) * 10 * y / 6)[:, None, None, None] * 2 * (model - target) / 100
        np.testing.assert_allclose(grad, wanted, atol=1e-12)


def test_kto_of_the_whole_batch_against_numpy():
    model, reference, target = drawn()
    g, y = improvement(model, reference, target), 2 * LABELS - 1
    w = np.where(y > 0, 1.3, 0.7)
    h = sigmoid((w * y * 10 * (g - max(g.mean(), 0))).mean())
    method = KTO(beta=20, whole_batch=True, desirable_weight=1.3, undesirable_weight=0.7)
    step, grad = run_on(method, model, reference, target, np.arange(6), LABELS)
    assert step.loss.item() == pytest.approx(1 - h, abs=1e-12)
    wanted = (h * (1 - h) * w * y * 10 / 6)[:, None, None, None] * 2 * (model - target) / 100
    np.testing.assert_allclose(grad, wanted, atol=1e-12)


def test_a_score_of_one_half_is_no_like():
    model, reference, target = drawn()
    score = np.array([1.0, 0, 0.5, 1, 0.5, 0])
    kept = [0, 1, 3, 5]
    all_six, grad = run_on(KTO(beta=20), model, reference, target, np.arange(6), score)
    four, _ = run_on(KTO(beta=20), model[kept], reference[kept], target[kept], np.arange(4), score[kept])
    assert all_six.weight.item() == 4 and not grad[[2, 4]].any()
    assert all_six.loss.item() == pytest.approx(four.loss.item(), abs=1e-12)
    nothing, grad = run_on(KTO(), model, reference, target, np.arange(6), np.full(6, 0.5))
    assert nothing.weight.item() == 0 and nothing.loss.item() == 0 and not grad.any()


def test_a_batch_of_one_class_has_finite_loss():
    model, reference, target = drawn()
    for kind in ("mean", "class_means"):
        step, grad = run_on(KTO(kl=kind), model, reference, target, np.arange(6), np.ones(6))
        assert np.isfinite(step.loss.item()) and np.isfinite(grad).all()


def batch_of(sizes, score, same_x=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(sizes), 3, 4, 4, generator=g, dtype=torch.float64)
    x = x.repeat_interleave(torch.tensor(sizes), 0) if same_x else x.new_empty(0)
    if not same_x:
        x = torch.randn(sum(sizes), 3, 4, 4, generator=g, dtype=torch.float64)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    text = torch.randn(sum(sizes), 2, generator=g, dtype=torch.float64)
    return Batch(x, {"text": text}, group, torch.as_tensor(score))


def affine(a, b=0.02):
    return Affine(sd_path(), torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


@pytest.mark.parametrize("method", [KTO(), KTO(utility=Sigmoid(), kl="class_means"), TKTO()])
def test_policy_equal_to_reference_is_one_half(method):
    step = method(affine(0.1), affine(0.1), batch_of([1] * 4, [1.0, 0, 0, 1]), Streams.at(0, 0, 4))
    assert step.loss.item() == 0.5 and step.metrics["rewards/accuracies"].item() == 0.5
    assert step.metrics["rewards/margins"].item() == 0.0


def test_members_of_a_list_are_likes_with_noise_of_their_own():
    """Two copies of one image in one group: their errors differ, since their noise does."""
    batch = batch_of([2, 2], [1.0, 0, 1, 0], same_x=True)
    batch = replace(batch, cond={})
    step = KTO(beta=10)(affine(0.4), affine(0.1), batch, Streams.at(0, 0, 2))
    assert step.weight.item() == 4
    assert step.metrics["errors/chosen"].item() != step.metrics["errors/rejected"].item()
    shared = TKTO(beta=10)(affine(0.4), affine(0.1), batch, Streams.at(0, 0, 2))
    assert shared.metrics["errors/chosen"].item() == shared.metrics["errors/rejected"].item()


def test_other_prompts_are_those_of_the_next_group():
    batch = Batch(
        torch.zeros(5, 1),
        {"text": torch.tensor([10, 11, 20, 30, 31])},
        torch.tensor([0, 0, 1, 2, 2]),
        torch.zeros(5),
    )
    assert other_prompts(batch)["text"].tolist() == [20, 20, 30, 10, 10]


def test_tdpo_is_dpo_between_captions_and_shares_the_noisy_state():
    batch = batch_of([2, 2, 2], [1.0, 0, 0, 1, 1, 0], same_x=True)
    steps = [
        method(affine(0.4), affine(0.1), batch, Streams.at(0, 0, 3))
        for method in (TDPO(beta=50), DPO(beta=50))
    ]
    assert steps[0].loss.item() == steps[1].loss.item() != np.log(2)
    same_caption = replace(batch, cond={})
    step = TDPO()(affine(0.4), affine(0.1), same_caption, Streams.at(0, 0, 3))
    assert step.metrics["rewards/margins"].item() == 0.0


@pytest.mark.parametrize("clip", [Clamp(0.02), Stop(0.05)])
def test_clipped_text_preferences_against_numpy(clip):
    """The losers' share of loss and gradient, by hand; winners are never limited."""
    rng = np.random.default_rng(3)
    target = np.tile(rng.normal(size=(3, 4, 5, 5)), (2, 1, 1, 1))
    reference = target + 0.4 * rng.normal(size=target.shape)
    model = target + np.repeat([0.4, 0.4, 0.4, 0.38, 0.46, 0.6], 100).reshape(target.shape) * rng.normal(
        size=target.shape
    )
    group, score = np.tile(np.arange(3), 2), np.repeat([1.0, 0.0], 3)
    g = improvement(model, reference, target)
    r = ((reference - target) ** 2).reshape(6, -1).mean(1)
    if isinstance(clip, Clamp):
        lost, free = g[3:].clip(-0.02, 0.02), np.abs(g[3:]) < 0.02
    else:
        lost, free = g[3:], r[3:] - g[3:] <= 1.05 * r[3:]
    assert free.any() and not free.all()
    h = 10 * (g[:3] - lost)
    slope = 10 * sigmoid(-h) / 3
    weight = np.concatenate([slope, -slope * free])
    wanted = weight[:, None, None, None] * 2 * (model - target) / 100
    step, grad = run_on(TDPO(beta=20, clip=clip), model, reference, target, group, score)
    assert step.loss.item() == pytest.approx(-log_sigmoid(h).mean(), abs=1e-12)
    np.testing.assert_allclose(grad, wanted, atol=1e-12)

    limited = np.concatenate([g[:3], lost])
    y = np.repeat([1, -1], 3)
    z = 10 * y * (limited - max(limited.mean(), 0))
    step, grad = run_on(TKTO(beta=20, clip=clip), model, reference, target, group, score)
    assert step.loss.item() == pytest.approx((1 - sigmoid(z)).mean(), abs=1e-12)
    assert (np.abs(grad[3:]).reshape(3, -1).max(1) > 0).tolist() == free.tolist()


def test_the_offset_is_that_of_all_processes_while_training_only(monkeypatch):
    """Two processes with the same likes double sum and count; a held-out batch asks no other process, since
    processes may hold unequally many.
    """
    called = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: called.append(sums.mul_(2)))
    model, reference, target = drawn(worse=0.1)
    step, _ = run_on(KTO(beta=20), model, reference, target, np.arange(6), LABELS)
    assert len(called) == 1
    assert step.metrics["kl"].item() == pytest.approx(10 * improvement(model, reference, target).mean())
    with torch.no_grad():
        KTO(beta=20)(affine(0.4), affine(0.1), batch_of([1] * 4, [1.0, 0, 0, 1]), Streams.at(0, 0, 4))
    assert len(called) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "kto", "beta": 0}, "method.beta=0.0.*more than 0"),
        ({"type": "kto", "kl": "means"}, "method.kl"),
        ({"type": "kto", "utility": "sigmoidal"}, "type of method.utility.*did you mean sigmoid"),
        ({"type": "tdpo", "clip": {"type": "clamp", "limit": 0}}, "clip.limit=0"),
        ({"type": "tkto", "beta": -1}, "method.beta=-1.0"),
        ({"type": "tdpo", "beta": -1}, "method.beta=-1.0"),
    ],
)
def test_bad_settings(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_build_from_a_mapping():
    assert build({"type": "kto", "utility": "loss_averse", "kl": "class_means"}) == KTO(
        utility=LossAverse(), kl="class_means"
    )
    assert build({"type": "tdpo", "clip": {"type": "stop", "excess": 0.2}}) == TDPO(clip=Stop(0.2))
