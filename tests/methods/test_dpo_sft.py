import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.pairwise import IPO, Hinge, Logistic, Robust
from diffalign.methods import REGISTRY, build
from diffalign.methods.dpo import DPO
from diffalign.methods.sft import SFT, winners
from diffalign.types import Batch, Noised
from tests.helpers import VECTORS, Affine, Answers, GivenNoise, GivenTimes, sd_path

GOLDEN = VECTORS / "diffusion_dpo.npz"


def halves(x, pairs):
    """Return a batch whose first half are the winners, as the released code lays it out."""
    group = torch.arange(pairs).repeat(2)
    score = torch.cat([torch.ones(pairs), torch.zeros(pairs)])
    return Batch(x, {}, group, score)


def run_on(method, model, reference, target):
    """Return the public method on given predictions and targets."""
    method = replace(method, time=GivenTimes((0.5,) * (len(target) // 2)), noising=GivenNoise(target))
    policy = model.clone().requires_grad_(True)
    batch = halves(torch.zeros_like(target), len(target) // 2)
    step = method(Answers(policy, sd_path()), Answers(reference, sd_path()), batch, torch.Generator())
    step.loss.backward()
    return step, policy.grad


@pytest.mark.parametrize("beta", [2000.0, 5000.0])
def test_loss_and_gradient_against_numpy(beta):
    """The formula of the paper in independent numpy, with its analytic gradient."""
    rng = np.random.default_rng(0)
    model, reference, target = (rng.normal(size=(6, 4, 5, 5)) * 0.05 for _ in range(3))
    errors = lambda p: ((p - target) ** 2).reshape(6, -1).mean(1)  # noqa: E731
    m, r = errors(model), errors(reference)
    inside = -beta / 2 * ((m[:3] - m[3:]) - (r[:3] - r[3:]))
    sigmoid = 1 / (1 + np.exp(-inside))
    slope = beta * (1 - sigmoid) / (3 * 100)
    grad = np.concatenate([slope, -slope])[:, None, None, None] * (model - target)

    step, got = run_on(DPO(beta=beta), *map(torch.from_numpy, (model, reference, target)))
    assert step.loss.item() == pytest.approx(-np.log(sigmoid).mean(), abs=1e-12)
    np.testing.assert_allclose(got.numpy(), grad, atol=1e-12)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx((inside > 0).mean())
    assert step.metrics["errors/chosen"].item() == pytest.approx((m - r)[:3].mean())
    assert step.metrics["errors/rejected"].item() == pytest.approx((m - r)[3:].mean())
    assert step.metrics["rewards/margins"].item() == pytest.approx(inside.mean())
    assert step.weight.item() == 3


@pytest.mark.parametrize(
    ("prefix", "method"),
    [
        ("sf_b5000_", DPO(beta=5000)),
        ("sf_b2000_", DPO(beta=2000)),
        ("hf_sd_sigmoid_b2500_", DPO(beta=5000)),  # that script leaves out the 1/2
        ("hf_sd_sigmoid_b5000_", DPO(beta=10000)),
        ("hf_sd_hinge_b2500_", DPO(beta=5000, loss=Hinge())),
        (
            "hf_sd_ipo_fixed_b2500_",
            DPO(beta=2, loss=IPO(tau=2500)),
        ),  # its logit has no beta, only its target has
        ("hf_sdxl_b5000_", DPO(beta=5000)),
    ],
)
def test_golden_vectors(prefix, method):
    f = np.load(GOLDEN)
    if prefix + "loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix}loss")
    step, grad = run_on(method, *(torch.from_numpy(f[k]) for k in ("model_pred", "ref_pred", "target")))
    tolerance = 1e-10 if prefix.startswith("sf_") else 1e-5 * max(1.0, abs(float(f[prefix + "loss"])))
    assert step.loss.item() == pytest.approx(float(f[prefix + "loss"]), abs=tolerance)
    np.testing.assert_allclose(grad.numpy(), f[prefix + "grad_model_pred"], atol=tolerance)
    if prefix + "implicit_acc" in f:
        assert step.metrics["rewards/accuracies"].item() == pytest.approx(float(f[prefix + "implicit_acc"]))


def test_golden_noising():
    """add_noise and the v target of the released code, with its sharing of time and noise."""
    f = np.load(GOLDEN)
    from diffalign.diffusion.likelihood import regression_target
    from diffalign.diffusion.noising import add_noise

    x0, eps = torch.from_numpy(f["noising_latents"]), torch.from_numpy(f["noising_noise"])
    t = torch.from_numpy(f["noising_timesteps"]).double() / 1000
    path = sd_path()
    np.testing.assert_allclose(path.alphas_cumprod.numpy(), f["alphas_cumprod_f32"], atol=0)
    denoiser = Answers(eps, path)
    x_t = add_noise(denoiser, x0, eps, t.to(x0.dtype))
    np.testing.assert_allclose(x_t.numpy(), f["noising_noisy_latents"], atol=1e-6)
    v = regression_target("v", denoiser, Noised(x0, eps, x_t, t.to(x0.dtype)))
    np.testing.assert_allclose(v.numpy(), f["noising_v_target"], atol=1e-6)


LOSSES = [Logistic(), Logistic(0.1), Hinge(), IPO(), Robust(0.1)]


def affine_step(method, score=None, a=0.1, streams=None):
    path = sd_path()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64)
    cond = {"text": torch.randn(3, 2, generator=g, dtype=torch.float64).repeat_interleave(2, 0)}
    score = torch.tensor([1.0, 0, 0, 1, 1, 0]) if score is None else score
    policy = Affine(path, torch.tensor(a, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64))
    reference = Affine(path, torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64))
    batch = Batch(x, cond, torch.arange(3).repeat_interleave(2), score)
    return method(policy, reference, batch, streams or Streams.at(0, 0, 3))


def test_policy_equal_to_reference_is_log_two_half_and_zero():
    """Rule 3."""
    step = affine_step(DPO())
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert step.metrics["rewards/accuracies"].item() == 0.5 and step.metrics["rewards/margins"].item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_winner_and_loser_mirrors_the_logit(loss):
    score = torch.tensor([1.0, 0, 0, 1, 1, 0])
    one, other = (affine_step(DPO(beta=10, loss=loss), s, a=0.3) for s in (score, 1 - score))
    assert one.metrics["rewards/margins"].item() == pytest.approx(-other.metrics["rewards/margins"].item())
    assert one.metrics["errors/chosen"].item() == pytest.approx(other.metrics["errors/rejected"].item())


def test_ties_change_nothing_but_the_weight():
    """Rule 4: a tied pair adds no loss, no gradient, no accuracy."""
    full = affine_step(DPO(beta=10), a=0.3)
    tied = affine_step(DPO(beta=10), torch.tensor([1.0, 0, 0, 1, 0.5, 0.5]), a=0.3)
    without = replace(DPO(beta=10))
    path = sd_path()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64)
    cond = {"text": torch.randn(3, 2, generator=g, dtype=torch.float64).repeat_interleave(2, 0)[:4]}
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    batch = Batch(x[:4], cond, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 0, 1]))
    alone = without(Affine(path, a, b), Affine(path, a - 0.2, b), batch, Streams.at(0, 0, 2))
    assert tied.weight.item() == 2 and full.weight.item() == 3
    assert tied.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)


def test_the_layout_of_a_batch_does_not_matter():
    order = torch.tensor([5, 2, 0, 3, 1, 4])
    path, method = sd_path(), DPO(beta=10)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=g, dtype=torch.float64)
    group, score = torch.arange(3).repeat_interleave(2), torch.tensor([1.0, 0, 0, 1, 1, 0])
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    losses = [
        method(Affine(path, a, b), Affine(path, a - 0.2, b), batch, Streams.at(0, 0, 3)).loss.item()
        for batch in (Batch(x, {}, group, score), Batch(x[order], {}, group[order], score[order]))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_winner_and_loser_share_time_and_noise():
    """Rule 5, through the method: identical images give a margin of exactly 0 under any policy."""
    path = sd_path()
    x = torch.randn(
        3, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).repeat_interleave(2, 0)
    batch = Batch(x, {}, torch.arange(3).repeat_interleave(2), torch.tensor([1.0, 0] * 3))
    a, b = torch.tensor(0.7, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    step = DPO()(Affine(path, a, b), Affine(path, a - 0.5, b), batch, Streams.at(0, 0, 3))
    assert step.metrics["rewards/margins"].item() == 0.0 and step.metrics["errors/chosen"].item() != 0.0


def test_any_split_of_a_batch_has_the_same_weighted_loss():
    """Rule 7 at the method's level, a tie included."""
    path, method = sd_path(), DPO(beta=10)
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 1, 0])
    a, b = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)

    def weighted(splits):
        total = count = 0.0
        for start, stop in splits:
            n = stop - start
            batch = Batch(
                x[2 * start : 2 * stop], {}, torch.arange(n).repeat_interleave(2), score[2 * start : 2 * stop]
            )
            step = method(Affine(path, a, b), Affine(path, a - 0.2, b), batch, Streams.at(0, start, n))
            total, count = total + (step.loss * step.weight).item(), count + step.weight.item()
        return total / count

    assert weighted([(0, 4)]) == pytest.approx(weighted([(0, 1), (1, 2), (2, 3), (3, 4)]), abs=1e-12)


def test_sft_is_the_mean_error_of_the_winners():
    path = sd_path()
    g = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    batch = Batch(
        torch.zeros(4, 3, 4, 4, dtype=torch.float64),
        {},
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.0, 1, 1, 0]),
    )
    method = SFT(time=GivenTimes((0.1, 0.9)), noising=GivenNoise(target))
    step = method(Answers(prediction, path), Answers(prediction, path), batch, torch.Generator())
    assert step.loss.item() == pytest.approx(((prediction - target) ** 2).mean().item(), abs=1e-12)
    assert step.weight.item() == 2


def test_sft_golden():
    f = np.load(GOLDEN)
    if "sft_loss_f32" not in f:
        pytest.skip("among the shipped vectors there is no sft_loss_f32")
    prediction, target = (torch.from_numpy(f[k])[:4].float() for k in ("model_pred", "target"))
    batch = Batch(torch.zeros_like(target), {}, torch.arange(4), torch.ones(4))
    method = SFT(time=GivenTimes((0.5,) * 4), noising=GivenNoise(target))
    step = method(Answers(prediction, sd_path()), Answers(prediction, sd_path()), batch, torch.Generator())
    assert step.loss.item() == pytest.approx(float(f["sft_loss_f32"]), rel=1e-5)


def test_winners_of_uneven_groups_and_ties():
    best, alone = winners(torch.tensor([0.1, 3.0, 0.4, 2.0, 2.0, 1.0]), torch.tensor([0, 1, 0, 2, 2, 1]))
    assert best[:2].tolist() == [2, 1] and alone.tolist() == [True, True, False]


def test_build_from_a_mapping():
    method = build(
        {
            "type": "dpo",
            "beta": "3e3",
            "loss": {"type": "ipo", "tau": 2},
            "time": {"type": "uniform", "low": 0.3},
        }
    )
    assert method == DPO(beta=3000.0, loss=IPO(tau=2.0), time=Uniform(low=0.3))
    assert build({"type": "dpo", "loss": "hinge"}).loss == Hinge()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no `type`"),
        ({"type": "dop"}, "unknown method.*'dop'.*did you mean dpo"),
        ({"type": "ipo"}, "'ipo': it is a loss of dpo; allowed: --method dpo --method.loss ipo"),
        ({"type": "dpo", "betta": 1}, "unknown key in method.*betta.*did you mean beta"),
        ({"type": "dpo", "beta": "much"}, "method.beta='much'.*a number"),
        ({"type": "dpo", "beta": -1}, "method.beta=-1.0.*more than 0"),
        ({"type": "dpo", "loss": "logistics"}, "type of method.loss.*did you mean logistic"),
        ({"type": "dpo", "loss": {"type": "ipo", "tau": 0}}, "loss.tau=0"),
        ({"type": "dpo", "time": {"type": "uniform", "low": 0.9, "high": 0.1}}, "low=0.9"),
        ({"type": "dpo", "time": 7}, "method.time=7"),
    ],
)
def test_bad_methods_are_refused_with_the_place(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_every_module_of_methods_has_a_card():
    assert {"dpo", "sft"} <= set(REGISTRY)
    for name, card in REGISTRY.items():
        assert card.name == name and card.paper and card.method.__doc__
