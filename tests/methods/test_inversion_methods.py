"""InPO, SmPO and Inversion-DPO: what the released code computes, and what it should."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.inversion import Inversion, along_grid, route_to, velocity_weight, walk
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import clean_and_noise
from diffalign.errors import UserError
from diffalign.methods import REGISTRY, build
from diffalign.methods.dpo import DPO
from diffalign.methods.inpo import InPO
from diffalign.methods.inversion_dpo import InversionDPO
from diffalign.methods.smpo import SmPO
from diffalign.types import Batch, Noised
from tests.helpers import VECTORS, Affine, Answers, GivenTimes, sd_path

f64 = {"dtype": torch.float64}


def toy(p=(0.0, 0.0), path=None, target="eps"):
    """(0.1 + p0 + t / 2) x + 0.05 + p1 + mean of the text: the toy of the reference vectors."""
    p = p if isinstance(p, torch.Tensor) else torch.tensor(p, **f64)
    return Affine(path or sd_path(), 0.1 + p[0], 0.05 + p[1], target)


@dataclass(frozen=True, eq=False)
class GivenStates:
    """A noising that gives the states it was made with."""

    z: Noised
    by: str = "policy"
    guidance: float = 1.0

    def __call__(self, denoiser, x0, t, cond, group, generator):
        return self.z


@dataclass
class GivenNormals:
    """Randomness whose normals are given: (count, members, steps, *d)."""

    normals: torch.Tensor

    def normal(self, count, shape=()):
        assert (count, *shape) == tuple(self.normals.shape)
        return self.normals

    def uniform(self, count, shape=()):
        raise AssertionError("no uniform draw is due")


def pair_batch(x, reward=None):
    count = len(x) // 2
    score = torch.cat([torch.ones(count), torch.zeros(count)])
    more = {} if reward is None else {"reward": reward}
    return Batch(x, {}, torch.arange(count).repeat(2), score, extra=more)


# The released losses.


def cases(file):
    return sorted({key.split("/")[0] for key in np.load(VECTORS / file).files if key.endswith("/x0")})


def noising_of(name, f, renoise):
    steps = int(f[f"{name}/nsteps"])
    modern = "modern" in name
    eta = 0.0 if renoise or "eta0" in name else 0.1
    return Inversion(steps, "destination" if modern else "source", "paper", eta=eta, renoise=renoise)


def golden_run(file, name, make):
    """(step, golden case, gradient) of a public method on the golden's inputs, and its inverted states."""
    f = {k.split("/", 1)[1]: v for k, v in np.load(VECTORS / file).items() if k.startswith(f"{name}/")}
    x0 = torch.from_numpy(f["x0"])
    t = (float(f["timestep"]) / 1000,)
    method = replace(make(f), time=GivenTimes(t))
    noise = torch.zeros(1, 2, method.noising.steps, *x0.shape[1:], **f64)
    if f.get("noise_z", np.zeros(0)).size:
        noise[0, :, : len(f["noise_z"])] = torch.from_numpy(f["noise_z"]).transpose(0, 1)
    generator = GivenNormals(noise)
    reward = None
    if "prob" in f:
        p = torch.from_numpy(f["prob"]).reshape(1)
        reward = torch.cat([torch.log(p / (1 - p)) * (method.high - method.low), torch.zeros(1, **f64)])
    batch = pair_batch(x0, reward)
    z = method.noising(toy(), x0, torch.full((2,), t[0], **f64), {}, batch.group, generator)
    if "model_pred" in f:  # predictions are given: the policy inverts as the toy does
        leaf = torch.from_numpy(f["model_pred"]).requires_grad_(True)
        policy, reference = (Answers(p, sd_path()) for p in (leaf, torch.from_numpy(f["ref_pred"])))
        method = replace(method, noising=GivenStates(z))
    else:
        leaf = torch.tensor(f["params" if "params" in f else "policy_params"]).requires_grad_(True)
        policy, reference = toy(leaf), toy()
        z = method.noising(policy, x0, torch.full((2,), t[0], **f64), {}, batch.group, generator)
    step = method(policy, reference, batch, generator)
    step.loss.backward()
    return f, step, leaf.grad, z


def held_against(f, step, gradient, z):
    np.testing.assert_allclose(z.x_t.numpy(), f["x_final"], atol=1e-10)
    np.testing.assert_allclose(z.eps.numpy(), f["tau"], atol=1e-10)
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    wanted = f["grad_model_pred"] if "grad_model_pred" in f else f["grad_params"]
    np.testing.assert_allclose(gradient.numpy(), wanted, atol=1e-10)
    errors = step.metrics["errors/chosen"] - step.metrics["errors/rejected"]
    if f["model_diff"].size == 1 and step.weight == 1:
        assert errors.item() == pytest.approx(float((f["model_diff"] - f["ref_diff"])[0]), abs=1e-10)


@pytest.mark.parametrize("name", cases("inpo.npz"))
def test_golden_inpo(name):
    f = np.load(VECTORS / "inpo.npz")
    make = lambda case: InPO(beta=float(case["beta"]), noising=noising_of(name, f, renoise=0))  # noqa: E731
    held_against(*golden_run("inpo.npz", name, make))


@pytest.mark.parametrize("name", cases("smpo.npz"))
def test_golden_smpo(name):
    f = np.load(VECTORS / "smpo.npz")
    make = lambda case: SmPO(beta=float(case["beta"]), noising=noising_of(name, f, renoise=1))  # noqa: E731
    held_against(*golden_run("smpo.npz", name, make))


def test_golden_smoothed_labels():
    """Weights gamma (2p - 1) of the label block, read off the loss's slope at policy = reference."""
    f = np.load(VECTORS / "smpo.npz")
    method = SmPO(beta=1.0)
    assert (method.low, method.high) == (float(f["label/min"]), float(f["label/max"]))
    for scores, weight in zip(f["label/scores"], f["label/weight_float64"], strict=True):
        assert slope(method, torch.tensor(scores)) == pytest.approx(weight, abs=1e-10)


def slope(method, reward, score=(1.0, 0.0)):
    """gamma (2p - 1), from the gradient of the loss by the margin where it is 0."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), **f64)
    leaf = torch.zeros(2, **f64, requires_grad=True)
    batch = Batch(x, {}, torch.tensor([0, 0]), torch.tensor(score), extra={"reward": reward})
    method = replace(method, time=GivenTimes((0.5,)))
    step = method(toy(leaf), toy(), batch, torch.Generator())
    step.loss.backward()
    plain = replace(
        batch, score=torch.tensor([1.0, 0.0]) if reward[0] >= reward[1] else torch.tensor([0.0, 1.0])
    )
    other = torch.zeros(2, **f64, requires_grad=True)
    DPO(beta=method.beta, time=method.time, noising=method.noising)(
        toy(other), toy(), plain, torch.Generator()
    ).loss.backward()
    return (leaf.grad / other.grad)[0].item()


INVERSION = VECTORS / "inversion_dpo.npz"


def inversion_cases():
    names = {key.split("/")[0] for key in np.load(INVERSION).files}
    return sorted(name for name in names if name.startswith("N"))


@pytest.mark.parametrize("name", inversion_cases())
@pytest.mark.parametrize("sign", ["released", "figure"])
def test_golden_inversion_dpo(name, sign):
    f = {k.split("/", 1)[1]: v for k, v in np.load(INVERSION).items() if k.startswith(f"{name}/")}
    steps, guidance = int(name[1:].split("_")[0]), float(name.split("_g")[1])
    x = torch.cat([torch.from_numpy(f["z0_w"]), torch.from_numpy(f["z0_l"])])
    ctx = torch.from_numpy(f["ctx"])
    batch = replace(
        pair_batch(x), cond={"text": ctx[1:].repeat(2, 1, 1)}, negative={"text": ctx[:1].repeat(2, 1, 1)}
    )
    leaf = torch.tensor(f["policy_params"]).requires_grad_(True)
    method = InversionDPO(2000.0, steps, guidance, target="reference", sign=sign, subset=None)
    shift = torch.tensor([0.0, -0.05], **f64)  # this file's toy has the text's mean in place of 0.05
    step = method(toy(leaf + shift), toy(shift), batch, torch.Generator())
    step.loss.backward()
    code = sign == "released"
    assert step.loss.item() == pytest.approx(
        float(f["loss_code_sign" if code else "loss_dpo_sign"]), abs=1e-10
    )
    inside = float(f["inside"]) * (1 if code else -1)
    assert step.metrics["rewards/margins"].item() == pytest.approx(inside, abs=1e-10)
    if code:
        np.testing.assert_allclose(leaf.grad.numpy(), f["grad_params_code_sign"], atol=1e-10)
    else:  # the other sign's gradient has the other sigmoid in front
        ratio = -math.exp(-float(f["inside"]))
        wanted = f["grad_params_code_sign"] / ratio
        np.testing.assert_allclose(leaf.grad.numpy(), wanted, atol=1e-10)
    asked = Guided(toy(shift), batch.negative, guidance)
    states = walk(
        method.noising, asked, x, along_grid(method.noising, sd_path(), torch.full((2,), steps)), batch.cond
    )
    for row, side in enumerate("wl"):
        np.testing.assert_allclose(torch.stack(states)[:, row].numpy(), f[f"traj_{side}"][:, 0], atol=1e-10)


@dataclass
class Leaves:
    """Predictions by step: the leaf of (side, step) when asked for all steps of two samples, else zeros."""

    leaves: torch.Tensor  # (2, N, *d), steps ascending

    path: Any = None
    target: str = "eps"

    def __call__(self, x_t, t, cond):
        return (
            self.leaves.flatten(0, 1) if len(x_t) == self.leaves.shape[:2].numel() else torch.zeros_like(x_t)
        )


@pytest.mark.parametrize("name", ["leaf", "leaf_init"])
@pytest.mark.parametrize("sign", ["released", "figure"])
def test_golden_inversion_dpo_on_leaves(name, sign):
    f = {k.split("/", 1)[1]: v for k, v in np.load(INVERSION).items() if k.startswith(f"{name}/")}
    word = "code" if sign == "released" else "dpo"
    if f"loss_{word}_sign" not in f:
        pytest.skip(f"among the shipped vectors there is no {name}/loss_{word}_sign")
    side = lambda who: torch.stack(  # noqa: E731
        [torch.from_numpy(f[f"eps_{who}_{s}"])[:, 0].flip(0) for s in "wl"]
    )
    leaf = side("theta").requires_grad_(True)
    x = torch.zeros(2, *leaf.shape[2:], **f64)
    beta = float(f["beta"]) if "beta" in f else 2000.0
    method = InversionDPO(beta, leaf.shape[1], 1.0, target="reference", sign=sign, subset=None)
    step = method(Leaves(leaf, sd_path()), Leaves(side("ref"), sd_path()), pair_batch(x), torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f[f"loss_{word}_sign"]), abs=1e-10)
    for row, s in enumerate("wl"):
        if f"grad_theta_{s}_{word}_sign" in f:
            np.testing.assert_allclose(
                leaf.grad[row].flip(0).numpy(), f[f"grad_theta_{s}_{word}_sign"][:, 0], atol=1e-10
            )
    if name == "leaf_init":
        assert step.loss.item() == pytest.approx(math.log(2), abs=1e-12) and not leaf.grad.any()


# What holds of all of them.

EXACT = Inversion(steps=6)
METHODS = {
    "inpo": InPO(beta=10, noising=replace(EXACT, eta=0.1)),
    "inpo paper": InPO(beta=10),
    "smpo": SmPO(beta=10, low=0.0, high=1.0, noising=replace(EXACT, steps=4, renoise=1)),
    "smpo paper": SmPO(beta=10, low=0.0, high=1.0),
    "inversion_dpo": InversionDPO(beta=10, steps=8, subset=2),
    "inversion_dpo all": InversionDPO(beta=10, steps=5, subset=None, guidance=1.0),
    "inversion_dpo released": InversionDPO(beta=10, steps=8, target="reference", sign="released", subset=2),
}


def pairs(groups=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2 * groups, 3, 4, 4, generator=g, **f64)
    text = torch.randn(groups, 2, generator=g, **f64).repeat_interleave(2, 0)
    score = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 1, 0])[: 2 * groups]
    reward = torch.tensor([0.8, 0.3, 0.9, 0.2, 0.1, 0.7, 0.4, 0.4], **f64)[: 2 * groups]
    return Batch(
        x, {"text": text}, torch.arange(groups).repeat_interleave(2), score,
        negative={"text": torch.zeros_like(text)}, extra={"reward": reward},
    )  # fmt: skip


def rows(batch, groups):
    """Return some groups of a batch of pairs, as a batch."""
    index = torch.cat([torch.tensor([2 * g, 2 * g + 1]) for g in groups])
    return replace(batch.select(index), group=torch.arange(len(groups)).repeat_interleave(2))


@pytest.mark.parametrize("name", METHODS)
def test_any_split_of_a_batch_has_the_same_weighted_loss_and_gradient(name):
    """Each pair has its own time and noise: a batch is its pairs one by one, in any order."""
    batch, method = pairs(), METHODS[name]

    def weighted(splits):
        leaf = torch.tensor([0.2, 0.05], **f64, requires_grad=True)
        total, count = 0.0, 0.0
        for groups in splits:
            step = method(toy(leaf), toy(), rows(batch, groups), Streams([10 + g for g in groups]))
            total, count = total + step.loss * step.weight, count + step.weight.item()
        total.backward()
        return total.item() / count, leaf.grad / count, count

    whole, parts = weighted([[0, 1, 2, 3]]), weighted([[3], [2, 0], [1]])
    assert whole[0] == pytest.approx(parts[0], abs=1e-12) and whole[2] == parts[2] == 3
    torch.testing.assert_close(whole[1], parts[1], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_policy_equal_to_reference_is_log_two(name):
    step = METHODS[name](toy(), toy(), pairs(), Streams.at(0, 0, 4))
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-14)
    assert step.metrics["rewards/margins"].item() == 0.0 and step.metrics["rewards/accuracies"].item() == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_a_human_tie_has_neither_loss_nor_gradient(name):
    batch = replace(pairs(), score=torch.zeros(8))
    leaf = torch.tensor([0.2, 0.05], **f64, requires_grad=True)
    step = METHODS[name](toy(leaf), toy(), batch, Streams.at(0, 0, 4))
    step.loss.backward()
    assert step.weight.item() == 0 and step.loss.item() == 0 and not leaf.grad.any()


@pytest.mark.parametrize("name", [n for n in METHODS if "smpo" not in n])
def test_winner_and_loser_mirror_each_other(name):
    """Turned labels turn the margin; identical images have none (with no noise added to either)."""
    batch, method = pairs(), METHODS[name]
    one, other = (
        method(toy((0.3, 0)), toy(), replace(batch, score=s), Streams.at(0, 0, 4))
        for s in (batch.score, 1 - batch.score)
    )
    assert one.metrics["rewards/margins"].item() == pytest.approx(-other.metrics["rewards/margins"].item())
    if name != "inpo" and name != "inpo paper":
        same = replace(batch, x=batch.x[::2].repeat_interleave(2, 0))
        step = method(toy((0.3, 0)), toy(), same, Streams.at(0, 0, 4))
        assert step.metrics["rewards/margins"].item() == pytest.approx(0, abs=1e-13)
        assert abs(step.metrics["errors/chosen"].item()) > 1e-4


@pytest.mark.parametrize(("target", "zero"), [("reference", True), ("clean", False)])
@pytest.mark.parametrize("sign", ["released", "figure"])
def test_the_released_loss_starts_on_a_stationary_point_and_ours_does_not(target, zero, sign):
    leaf = torch.zeros(2, **f64, requires_grad=True)
    method = InversionDPO(steps=8, target=target, sign=sign, subset=None)
    method(toy(leaf), toy(), pairs(), Streams.at(0, 0, 4)).loss.backward()
    assert (leaf.grad.abs().max().item() == 0) == zero


def test_our_gradient_fits_winners_and_the_released_sign_turns_it():
    grads = []
    for sign in ("figure", "released"):
        leaf = torch.zeros(2, **f64, requires_grad=True)
        method = InversionDPO(beta=1e-3, steps=8, sign=sign, subset=None)
        method(toy(leaf), toy(), pairs(), Streams.at(0, 0, 4)).loss.backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], -grads[1])
    after = InversionDPO(beta=1.0, steps=8, subset=None)(
        toy(-1e-3 * grads[0] / grads[0].norm()), toy(), pairs(), Streams.at(0, 0, 4)
    )
    assert after.metrics["rewards/margins"].item() > 0


def test_our_loss_against_numpy():
    """One pair, every step, without guidance: states, noise and weights in plain numpy."""
    path, steps, beta = sd_path(), 5, 50.0
    ab = path.alphas_cumprod.double().numpy()
    x0 = np.random.default_rng(0).normal(size=(2, 2, 3, 3))
    eps = lambda x, t, p: (0.1 + p + t / 2000) * x + 0.05  # noqa: E731
    gain = np.zeros(2)
    for row in range(2):
        x, level = x0[row], 0
        for t in (0, 200, 400, 600, 800):
            e = eps(x, t, 0.0)
            x = np.sqrt(ab[t] / ab[level]) * (x - np.sqrt(1 - ab[level]) * e) + np.sqrt(1 - ab[t]) * e
            level = t
            tau = (x - np.sqrt(ab[t]) * x0[row]) / np.sqrt(1 - ab[t])
            errors = [((eps(x, t, p) - tau) ** 2).mean() for p in (0.02, 0.0)]
            gain[row] -= 0.5 * (errors[0] - errors[1]) / (2 * ab[t]) / steps
    margin = beta * (gain[0] - gain[1])
    method = InversionDPO(beta=beta, steps=steps, guidance=1.0, subset=None)
    step = method(toy((0.02, 0.0)), toy(), pair_batch(torch.from_numpy(x0)), torch.Generator())
    assert step.metrics["rewards/margins"].item() == pytest.approx(margin, abs=1e-12)
    assert step.loss.item() == pytest.approx(np.log1p(np.exp(-margin)), abs=1e-12)


@pytest.mark.parametrize("target", ["clean", "reference"])
def test_a_random_subset_of_steps_is_unbiased(target):
    """The mean margin over every single step is the margin of all of them; and draws hit steps evenly."""
    batch, every = pairs(1), InversionDPO(beta=3.0, steps=8, target=target, subset=None)
    margin = lambda m: m(toy((0.2, 0)), toy(), batch, Streams.at(0, 0, 1)).metrics["rewards/margins"]  # noqa: E731
    single = [margin(replace(every, subset=1, time=GivenTimes(((k + 0.5) / 8,)))).item() for k in range(8)]
    assert np.mean(single) == pytest.approx(margin(every).item(), abs=1e-12)
    assert margin(replace(every, subset=3, time=GivenTimes((0.3,)))).item() == pytest.approx(single[2])
    t = InversionDPO().time(80_000, torch.Generator().manual_seed(0))
    counts = torch.bincount((t * 80).long(), minlength=80)
    assert len(counts) == 80 and (counts.double() / 1000 - 1).abs().max() < 0.2


def test_the_figures_inversion_is_cached(tmp_path):
    """A second visit asks the reference for nothing but its errors at the drawn steps."""

    @dataclass
    class Counted(Affine):
        samples: int = 0

        def __call__(self, x_t, t, cond):
            self.samples += len(x_t)
            return super().__call__(x_t, t, cond)

    batch = pairs()
    method = InversionDPO(steps=8, subset=None, cache=str(tmp_path))
    asked, losses = [], []
    for _ in range(2):
        reference = Counted(sd_path(), torch.tensor(0.1, **f64), torch.tensor(0.05, **f64))
        losses.append(method(toy((0.2, 0.0)), reference, batch, Streams.at(0, 0, 4)).loss.item())
        asked.append(reference.samples)
    # Guided: 8 images x 8 steps x 2 to invert, as many for the errors.
    assert asked == [256, 128] and losses[0] == losses[1]


@pytest.mark.parametrize("target", ["flow", "v"])
@pytest.mark.parametrize("name", METHODS)
def test_other_targets_and_paths(name, target):
    if target == "flow" and name in ("inpo", "inpo paper"):
        pytest.skip("added noise needs a variance-preserving path")
    path = RectifiedFlow() if target == "flow" else sd_path()
    leaf = torch.tensor([0.2, 0.05], **f64, requires_grad=True)
    step = METHODS[name](toy(leaf, path, target), toy(path=path, target=target), pairs(), Streams.at(0, 0, 4))
    step.loss.backward()
    assert torch.isfinite(step.loss) and torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0


@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_the_weight_is_half_a_velocity_error_whatever_is_predicted(target):
    """Two predictions at one state: 1 / (2 abar) on the noise is 1 / 2 on v."""
    t = torch.tensor([0.05, 0.4, 0.95], **f64)
    x, text = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0), **f64), {}
    alpha, sigma = (c[:, None, None, None] for c in sd_path().coefficients(t))
    velocity = []
    one, other = (toy(p, target=target) for p in ((0.0, 0.0), (0.3, 0.1)))
    squared = ((one(x, t, text) - other(x, t, text)) ** 2).flatten(1).mean(1)
    for denoiser in (one, other):
        x0, eps = clean_and_noise(denoiser, x, t, text)
        velocity.append(alpha * eps - sigma * x0)
    wanted = ((velocity[0] - velocity[1]) ** 2).flatten(1).mean(1) / 2
    torch.testing.assert_close(velocity_weight(one, t) * squared, wanted, rtol=1e-10, atol=0)


# SmPO's labels.


def test_smoothed_labels_by_hand():
    """gamma (2p - 1) with p = 1 / (1 + exp(-(r_w - r_l))), whoever is first, whatever the human said."""
    method = SmPO(beta=1.0, low=0.0, high=2.0, gamma=10.0)
    weight = 10 * (2 / (1 + math.exp(-(0.9 - 0.3) / 2)) - 1)
    assert slope(method, torch.tensor([0.9, 0.3], **f64)) == pytest.approx(weight, abs=1e-10)
    assert slope(method, torch.tensor([0.3, 0.9], **f64)) == pytest.approx(weight, abs=1e-10)
    assert slope(method, torch.tensor([0.9, 0.3], **f64), (0.0, 1.0)) == pytest.approx(weight, abs=1e-10)
    assert slope(method, torch.tensor([0.5, 0.5], **f64)) == 0
    assert slope(SmPO(), torch.tensor([SmPO().high, SmPO().low], **f64)) == pytest.approx(
        4.6211715726, abs=1e-9
    )


def test_equal_rewards_are_a_constant_loss_and_human_ties_none():
    batch = replace(pairs(1), extra={"reward": torch.tensor([0.4, 0.4], **f64)})
    leaf = torch.tensor([0.2, 0.05], **f64, requires_grad=True)
    step = SmPO(beta=10)(toy(leaf), toy(), batch, Streams.at(0, 0, 1))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(math.log(2)) and step.weight.item() == 1 and not leaf.grad.any()


def test_without_a_second_opinion_the_score_is_the_reward():
    batch = pairs()
    scored = replace(batch, score=batch.extra["reward"], extra={})
    given = replace(batch, score=batch.extra["reward"])
    losses = [METHODS["smpo"](toy((0.2, 0)), toy(), b, Streams.at(0, 0, 4)) for b in (scored, given)]
    assert losses[0].loss.item() == losses[1].loss.item() and losses[0].weight.item() == 3


# Defaults and bad values.


def test_defaults_are_the_released_settings_and_one_field_changes_one_field():
    assert build({"type": "inpo"}).noising == Inversion(10, "source", "paper", 1, 0.1)
    assert build({"type": "smpo"}).noising == Inversion(5, "source", "paper", 1, 0.0, 1)
    exact = build({"type": "smpo", "noising": {"mode": "exact"}})
    assert exact.noising == replace(SmPO().noising, mode="exact")
    assert build({"type": "dpo", "noising": "inversion"}).noising == Inversion()
    noising = InversionDPO().noising
    assert (noising.steps, noising.offset, noising.guidance, noising.by) == (80, 0, 2.0, "reference")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "inpo", "beta": 0}, "method.beta=0.0"),
        ({"type": "inpo", "noising": {"mode": "exakt"}}, "method.noising.mode 'exakt'"),
        ({"type": "smpo", "high": 0.1}, "high=0.1.*high more than low"),
        ({"type": "inversion_dpo", "subset": 0}, "subset=0"),
        ({"type": "inversion_dpo", "sign": "relesed"}, "method.sign 'relesed'.*released"),
        ({"type": "inversion_dpo", "steps": 0}, "steps=0"),
    ],
)
def test_bad_values_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_several_opinions_are_refused():
    batch = replace(pairs(1), extra={"reward": torch.ones(2, 3)})
    with pytest.raises(UserError, match="one score per sample"):
        SmPO()(toy(), toy(), batch, Streams.at(0, 0, 1))


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("inpo", [-99, *range(1, 802, 100)], "about 6 steps"),
        ("smpo", [-199, 1, 201, 401, 601], "about 4 steps"),
    ],
)
def test_the_number_of_inversion_steps_that_a_card_states(name, entries, words):
    """A sample of timestep t makes the steps of the released grid that start below t; t is uniform."""
    t = torch.arange(1000, **f64) / 1000
    counts = route_to(build({"type": name}).noising, sd_path(), t).length
    by_hand = np.mean([sum(entry < timestep for entry in entries) for timestep in range(1000)])
    assert counts.double().mean().item() == pytest.approx(by_hand, abs=1e-9)
    assert words in REGISTRY[name].cost and round(by_hand) == int(words.split()[1])
