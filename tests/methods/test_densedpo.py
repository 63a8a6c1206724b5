"""DenseDPO and Flow-DPO against the published numbers, and against the formulas written out in numpy."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.diffusion.likelihood import PerFrame
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.times import Uniform
from diffalign.errors import UserError
from diffalign.losses.contrast import contrast, per_pair
from diffalign.methods import build
from diffalign.methods.densedpo import DenseDPO
from diffalign.methods.dpo import DPO
from diffalign.strategies.sft import SFTMix
from diffalign.types import Batch
from tests.helpers import VECTORS, GivenNoise, GivenTimes, sd_path

DENSE, FLOW = VECTORS / "densedpo.npz", VECTORS / "flow_dpo.npz"
CASES = sorted({key.split("/")[0] for key in np.load(DENSE) if "/label" in key})


@dataclass
class Velocity:
    """A flow network that gives fixed velocities, and knows which states it was asked about."""

    prediction: Tensor
    expected: Tensor | None = None
    target: str = "flow"
    path: RectifiedFlow = RectifiedFlow()

    def __call__(self, x_t, t, cond):
        if self.expected is not None:
            torch.testing.assert_close(x_t, self.expected, atol=1e-12, rtol=0)
        return self.prediction


def ours(array: np.ndarray) -> Tensor:
    """(B, T, C, h, w) as it is published to (B, C, T, h, w)."""
    return torch.from_numpy(array).transpose(1, 2)


def dense(f, case, method, label=None):
    """Return the public method on a golden case: rows are all first videos, then all second ones.

    Returns the step and the gradients of both halves, in the published layout.
    """
    both = lambda name: torch.cat([ours(f[f"{case}/{name}_{i}"]) for i in (0, 1)])  # noqa: E731
    label = torch.from_numpy(f[f"{case}/label"] if label is None else label)
    noise = ours(f[f"{case}/noise"]).repeat(2, 1, 1, 1, 1)
    times = tuple(f[f"{case}/t"].tolist())
    method = replace(method, time=GivenTimes(times), noising=GivenNoise(noise))
    prediction = both("pred").clone().requires_grad_(True)
    batch = Batch(both("x"), {}, torch.arange(len(times)).repeat(2), torch.cat([label, 0 * label]))
    policy = Velocity(prediction, both("noisy"))
    step = method(policy, Velocity(both("ref"), both("noisy")), batch, torch.Generator())
    step.loss.backward()
    return step, [grad.transpose(1, 2).numpy() for grad in prediction.grad.chunk(2)]


@pytest.mark.parametrize("case", CASES)
def test_golden_dense_loss_and_gradient(case):
    f = np.load(DENSE)
    step, grads = dense(f, case, DenseDPO(beta=float(f[f"{case}/beta"])))
    decided = f[f"{case}/label"] != 0
    assert step.weight.item() == decided.sum()
    if f"{case}/loss" in f and decided.any():
        assert step.loss.item() == pytest.approx(float(f[f"{case}/loss"]), abs=1e-10)
    if f"{case}/inside" in f and decided.any():
        inside = f[f"{case}/inside"][decided]
        assert step.metrics["rewards/margins"].item() == pytest.approx(inside.mean(), abs=1e-10)
        assert step.metrics["rewards/accuracies"].item() == pytest.approx((inside > 0).mean())
    for i, grad in enumerate(grads):
        if f"{case}/grad_pred_{i}" in f:
            np.testing.assert_allclose(grad, f[f"{case}/grad_pred_{i}"], atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("average", "name"),
    [
        ("videos", "loss_per_video_mean"),
        ("sum", "loss_eq7_sum_inside_sigmoid"),
        ("mean", "loss_eq7_mean_inside_sigmoid"),
    ],
)
def test_golden_reductions(case, average, name):
    f = np.load(DENSE)
    if f"{case}/{name}" not in f:
        pytest.skip(f"among the shipped vectors there is no {case}/{name}")
    step, _ = dense(f, case, DenseDPO(beta=float(f[f"{case}/beta"]), average=average))
    decided = (f[f"{case}/label"] != 0).any(1)
    assert step.weight.item() == decided.sum()
    published = float(f[f"{case}/{name}"])
    if average != "videos":  # equation 7 counts a pair without a label as log 2, with no gradient
        published = (published - math.log(2) * (~decided).mean()) / max(decided.mean(), 1e-9)
    if decided.all():
        assert step.loss.item() == pytest.approx(published, abs=1e-10)
    elif average != "videos":
        assert step.loss.item() == pytest.approx(published if decided.any() else 0.0, abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_golden_vanilla(case):
    f = np.load(DENSE)
    if f"{case}/vanilla_loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {case}/vanilla_loss")
    step, grads = dense(f, case, DPO(beta=float(f[f"{case}/beta"])), f[f"{case}/vanilla_label"])
    assert step.loss.item() == pytest.approx(float(f[f"{case}/vanilla_loss"]), abs=1e-10)
    margins = step.metrics["rewards/margins"].item()
    assert margins == pytest.approx(f[f"{case}/vanilla_inside"].mean(), abs=1e-10)
    for i, grad in enumerate(grads):
        if f"{case}/vanilla_grad_pred_{i}" in f:
            np.testing.assert_allclose(grad, f[f"{case}/vanilla_grad_pred_{i}"], atol=1e-10)


# the formulas, written out


def videos(pairs=3, frames=4, seed=0):
    """(model, reference, target) of first and second videos, (2, pairs, 2, frames, 3, 3), and labels."""
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(3, 2, pairs, 2, frames, 3, 3)) * 0.05
    label = rng.integers(-1, 2, size=(pairs, frames)).astype(float)
    label[0] = [1, 0, -1, -1]
    label[-1] = 0
    return *arrays, label


def step_on(method, model, reference, target, label, t=0.5):
    """Return the public method on given velocities; rows are first videos, then second ones."""
    flat = lambda a: torch.from_numpy(a.reshape(-1, *a.shape[2:]))  # noqa: E731
    policy, score = flat(model).clone().requires_grad_(True), torch.from_numpy(label)
    pairs = len(label)
    method = replace(method, time=GivenTimes((t,) * pairs), noising=GivenNoise(flat(target)))
    batch = Batch(
        torch.zeros_like(policy),
        {},
        torch.arange(pairs).repeat(2),
        torch.cat([score, torch.zeros_like(score)]),
    )
    step = method(Velocity(policy), Velocity(flat(reference)), batch, torch.Generator())
    step.loss.backward()
    return step, policy.grad.numpy().reshape(model.shape)


def softplus(x):
    return np.log1p(np.exp(x))


def test_every_average_against_numpy():
    model, reference, target, label = videos()
    beta = 800.0
    errors = lambda p: ((p - target) ** 2).mean((2, 4, 5))  # noqa: E731  # (2, pairs, frames)
    d = errors(model) - errors(reference)
    inside = -beta / 2 * label * (d[0] - d[1])
    decided = label != 0
    own = [softplus(-inside[i][decided[i]]) for i in range(3) if decided[i].any()]
    joint = [inside[i][decided[i]] for i in range(3) if decided[i].any()]
    expected = {
        "frames": np.concatenate(own).mean(),
        "videos": np.mean([o.mean() for o in own]),
        "sum": np.mean([softplus(-i.sum()) for i in joint]),
        "mean": np.mean([softplus(-i.mean()) for i in joint]),
    }
    for average, value in expected.items():
        step, grad = step_on(DenseDPO(beta=beta, average=average), model, reference, target, label)
        assert step.loss.item() == pytest.approx(value, abs=1e-12), average
        count = decided.sum() if average == "frames" else len(own)
        assert step.weight.item() == count
        assert not grad[:, ~decided.any(1)].any() and not np.moveaxis(grad, 3, 2)[:, ~decided].any()
    slope = beta * label / (1 + np.exp(inside)) / decided.sum() / 18  # 18 elements a frame
    _, grad = step_on(DenseDPO(beta=beta), model, reference, target, label)
    by_hand = np.stack([slope, -slope])[:, :, None, :, None, None] * (model - target)
    np.testing.assert_allclose(grad, by_hand, atol=1e-12)


@pytest.mark.parametrize("average", ["frames", "videos", "sum", "mean"])
def test_swapping_the_videos_changes_nothing_but_the_sides(average):
    model, reference, target, label = videos()
    method = DenseDPO(beta=300, average=average)
    one, _ = step_on(method, model, reference, target, label)
    other, _ = step_on(method, *(a[::-1].copy() for a in (model, reference, target)), -label)
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-12)


@pytest.mark.parametrize("average", ["frames", "videos", "sum", "mean"])
def test_nothing_has_moved_and_nothing_is_decided(average):
    model, _, target, label = videos()
    step, _ = step_on(DenseDPO(average=average), model, model, target, label)
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx(0.5)
    step, grad = step_on(DenseDPO(average=average), model, 0 * model, target, 0 * label)
    assert step.loss.item() == 0 == step.weight.item() and not grad.any()


def test_one_label_for_all_frames_and_one_frame_are_flow_dpo():
    """Equation 7's mean over frames that all have one label is Diffusion-DPO of the whole video."""
    model, reference, target, _ = videos()
    label = np.array([1.0, -1.0, 1.0])
    whole, grad = step_on(DPO(beta=700), model, reference, target, label)
    every, dense_grad = step_on(
        DenseDPO(beta=700, average="mean"), model, reference, target, label[:, None].repeat(4, 1)
    )
    assert every.loss.item() == pytest.approx(whole.loss.item(), abs=1e-13)
    np.testing.assert_allclose(dense_grad, grad, atol=1e-13)
    one = [a[:, :, :, :1] for a in (model, reference, target)]
    still, _ = step_on(DenseDPO(beta=700), *one, label[:, None])
    assert still.loss.item() == pytest.approx(step_on(DPO(beta=700), *one, label)[0].loss.item(), abs=1e-13)


def test_any_split_of_a_batch_has_the_same_weighted_loss():
    """Rule 7, ties included: frames are counted, not pairs."""
    model, reference, target, label = videos(pairs=4)
    for average in ("frames", "videos", "sum"):
        method = DenseDPO(beta=300, average=average)
        parts = [
            step_on(method, *(a[:, i : i + 1] for a in (model, reference, target)), label[i : i + 1])[0]
            for i in range(4)
        ]
        total = sum((p.loss * p.weight).item() for p in parts) / sum(p.weight.item() for p in parts)
        whole, _ = step_on(method, model, reference, target, label)
        assert whole.loss.item() == pytest.approx(total, abs=1e-12)


def test_pooled_comparisons_by_hand():
    log_ratio = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    score = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    c = contrast(log_ratio, score, torch.tensor([0, 0]))
    total, mean = per_pair(c, "sum"), per_pair(c, "mean")
    assert total.chosen.tolist() == [1 + 16] and total.rejected.tolist() == [8 + 2]
    assert mean.margin.tolist() == [3.5] and mean.weight.tolist() == [1] == total.weight.tolist()
    assert c.mean_per_pair(torch.tensor([[3.0, 5.0, 100.0]])).tolist() == [4.0]


def test_errors_measured_in_noise():
    """beta (1 - t)^2 of a flow's velocity errors is beta of its noise errors, exactly; likewise of v."""
    model, reference, target, label = videos()
    plain = DenseDPO(beta=600, over_time="alpha_squared")
    t = 0.3
    weighted, grad = step_on(plain, model, reference, target, label, t)
    scaled, other = step_on(DenseDPO(beta=600 * (1 - t) ** 2), model, reference, target, label, t)
    assert weighted.loss.item() == pytest.approx(scaled.loss.item(), abs=1e-12)
    np.testing.assert_allclose(grad, other, atol=1e-12)

    generator = torch.Generator().manual_seed(0)
    x, noise, guess, held = torch.randn(4, 6, 4, 3, 3, generator=generator, dtype=torch.float64)
    batch = Batch(x, {}, torch.arange(3).repeat(2), torch.tensor([1.0, 0, 1, 0, 1, 0]))
    times = (0.05, 0.51, 0.98)
    paths = {"flow": RectifiedFlow(), "v": sd_path()}
    for target_name, path in paths.items():
        t = torch.tensor(times, dtype=torch.float64)[batch.group]
        alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in path.coefficients(t))
        x_t = alpha * x + sigma * noise

        def velocity(eps, x_t=x_t, alpha=alpha, sigma=sigma, flow=target_name == "flow"):
            """Return the prediction of this noise at x_t: eps - x0 of a flow, alpha eps - sigma x0 of v."""
            x0 = (x_t - sigma * eps) / alpha
            return eps - x0 if flow else alpha * eps - sigma * x0

        method = DPO(beta=3, time=GivenTimes(times), noising=GivenNoise(noise))
        ask = lambda p, path=path, name=target_name: Velocity(p, target=name, path=path)  # noqa: E731
        in_velocity = replace(method, over_time="alpha_squared")(
            ask(velocity(guess)), ask(velocity(held)), batch, torch.Generator()
        )
        in_noise = method(
            Velocity(guess, target="eps", path=path),
            Velocity(held, target="eps", path=path),
            batch,
            torch.Generator(),
        )
        assert in_velocity.loss.item() == pytest.approx(in_noise.loss.item(), abs=1e-10), target_name
        constant = method(ask(velocity(guess)), ask(velocity(held)), batch, torch.Generator())
        assert constant.loss.item() != pytest.approx(in_noise.loss.item(), abs=1e-3)


def test_time_and_noise_are_the_pairs_own():
    """Two equal videos give a margin of exactly 0 in every frame, under any policy."""
    x = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)

    @dataclass
    class Line:
        a: float
        target: str = "flow"
        path: RectifiedFlow = RectifiedFlow()

        def __call__(self, x_t, t, cond):
            return self.a * x_t + t.reshape(-1, 1, 1, 1, 1)

    score = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]] * 3)
    step = DenseDPO()(
        Line(0.5), Line(0.1), Batch(x, {}, torch.arange(3).repeat_interleave(2), score), Streams.at(0, 0, 3)
    )
    assert step.metrics["rewards/margins"].item() == 0.0 and step.metrics["errors/chosen"].item() != 0.0


@pytest.mark.parametrize(
    ("x", "score", "words"),
    [
        ((2, 4, 8, 8), (2,), r"latents of shape \(2, 4, 8, 8\) are images; allowed: videos"),
        ((2, 4, 5, 8, 8), (2,), r"scores of shape \(2,\) for 5 latent frames; .*label-segments.*dpo"),
        ((2, 4, 5, 8, 8), (2, 3), r"scores of shape \(2, 3\) for 5 latent frames; allowed: .*\(2, 5\)"),
    ],
)
def test_what_has_no_frames_or_no_labels_is_refused(x, score, words):
    batch = Batch(torch.zeros(x), {}, torch.zeros(2, dtype=torch.long), torch.zeros(score))
    with pytest.raises(UserError, match=words):
        DenseDPO()(Velocity(batch.x), Velocity(batch.x), batch, torch.Generator())


def test_settings():
    method = build({"type": "densedpo", "beta": 100, "average": "videos", "loss": "hinge", "time": "uniform"})
    assert method == replace(DenseDPO(beta=100, average="videos"), loss=method.loss, time=Uniform())
    with pytest.raises(UserError, match=r"method.average.*'clips'"):
        build({"type": "densedpo", "average": "clips"})
    with pytest.raises(UserError, match=r"over_time.*'beta_t'"):
        build({"type": "dpo", "over_time": "beta_t"})
    with pytest.raises(UserError, match="beta=0"):
        DenseDPO(beta=0)


def test_frames_are_means_over_everything_else():
    squared = torch.arange(2 * 3 * 4 * 2 * 2, dtype=torch.float64).reshape(2, 3, 4, 2, 2)
    assert PerFrame()(squared)[1, 2] == squared[1, :, 2].mean()
    with pytest.raises(UserError, match="no frames"):
        PerFrame()(squared[0])


# Flow-DPO


def flow(f, method, sign=1.0, key="model_pred"):
    """Return the public method on flow_dpo.npz, winners first, with the published times and states."""
    arrays = {name: torch.from_numpy(f[name]).double() for name in ("model_input", "noise", "noisy")}
    times = tuple(f["sigmas"][:3].reshape(3).tolist())
    inner = replace(method, time=GivenTimes(times), noising=GivenNoise(arrays["noise"]))
    policy = torch.from_numpy(f["model_pred"]).clone().requires_grad_(True)
    score = torch.tensor([1.0] * 3 + [0.0] * 3)
    batch = Batch(arrays["model_input"], {}, torch.arange(3).repeat(2), score)
    held = Velocity(torch.from_numpy(f["model_pred_ref"]), arrays["noisy"])
    return inner, Velocity(policy, arrays["noisy"]), held, batch


@pytest.mark.parametrize("beta", [1, 100, 500, 2000])
def test_golden_flow_dpo(beta):
    f = np.load(FLOW)
    if f"loss_b{beta}" not in f:
        pytest.skip(f"among the shipped vectors there is no loss_b{beta}")
    method, policy, reference, batch = flow(f, DPO(beta=beta))
    step = method(policy, reference, batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f[f"loss_b{beta}"]), abs=1e-10)
    margins = step.metrics["rewards/margins"].item()
    assert margins == pytest.approx(f[f"inside_b{beta}"].mean(), abs=1e-10)
    np.testing.assert_allclose(policy.prediction.grad.numpy(), f[f"grad_b{beta}"], atol=1e-10)


def test_golden_flow_dpo_errors_and_target():
    f = np.load(FLOW)
    np.testing.assert_allclose(
        f["target"] if "target" in f else f["noise"] - f["model_input"], f["noise"] - f["model_input"]
    )
    method, policy, reference, batch = flow(f, DPO(beta=1))
    step = method(policy, reference, batch, torch.Generator())
    for name, key in (("errors/chosen", "w_diff"), ("errors/rejected", "l_diff")):
        if key in f:
            assert step.metrics[name].item() == pytest.approx(f[key].mean(), abs=1e-12)


def test_golden_javis():
    """beta 3000 and a tenth of the winner's error; its velocity is x0 - noise, so its gradient has the other
    sign.
    """
    f = np.load(FLOW)
    if "javis_loss_mean" not in f:
        pytest.skip("among the shipped vectors there is no javis_loss_mean")
    method, policy, reference, batch = flow(f, DPO(beta=3000))
    step = SFTMix(weight=0.1).wrap(method)(policy, reference, batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["javis_loss_mean"]), abs=1e-10)
    np.testing.assert_allclose(-policy.prediction.grad.numpy(), f["javis_grad"], atol=1e-10)


def test_golden_beta_over_time():
    f = np.load(FLOW)
    if "formula_betat_loss" not in f:
        pytest.skip("among the shipped vectors there is no formula_betat_loss")
    method, policy, reference, batch = flow(f, DPO(beta=500, over_time="alpha_squared"))
    step = method(policy, reference, batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["formula_betat_loss"]), abs=1e-9)
    np.testing.assert_allclose(policy.prediction.grad.numpy(), f["formula_betat_grad"], atol=1e-9)


def test_winners_errors_and_a_beta_of_time_by_hand():
    """The same two settings with numpy beside them, whatever the file holds of them."""
    f = np.load(FLOW)
    errors = lambda p: ((p - (f["noise"] - f["model_input"])) ** 2).reshape(6, -1).mean(1)  # noqa: E731
    m, r = errors(f["model_pred"]), errors(f["model_pred_ref"])
    inside = -0.5 * ((m[:3] - r[:3]) - (m[3:] - r[3:]))
    method, policy, reference, batch = flow(f, DPO(beta=3000))
    step = SFTMix(weight=0.1).wrap(method)(policy, reference, batch, torch.Generator())
    assert step.loss.item() == pytest.approx((softplus(-3000 * inside) + 0.1 * m[:3]).mean(), abs=1e-10)
    method, policy, reference, batch = flow(f, DPO(beta=500, over_time="alpha_squared"))
    step = method(policy, reference, batch, torch.Generator())
    beta_t = 500 * (1 - f["sigmas"][:3].reshape(3)) ** 2
    assert step.loss.item() == pytest.approx(softplus(-beta_t * inside).mean(), abs=1e-10)
