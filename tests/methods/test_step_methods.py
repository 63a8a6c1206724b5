import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffalign.diffusion.likelihood import step_kl, step_log_density
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.samplers import DDIM, FlowSDE, timesteps
from diffalign.errors import UserError
from diffalign.losses.pairwise import IPO
from diffalign.methods import REGISTRY, build
from diffalign.methods._steps import as_drawn, likelihood
from diffalign.methods.d3po import CARD as D3PO_CARD
from diffalign.methods.d3po import D3PO
from diffalign.methods.ddpo import DDPO
from diffalign.methods.spo import SPO
from diffalign.rollout.rounds import best_and_worst
from diffalign.types import Batch, Transition
from tests.helpers import VECTORS, Answers, sd_path

GOLDEN = VECTORS
RANDOM = torch.Generator()


class Golden:
    """Arrays of a reference file as tensors; a test that asks for one that is not there skips."""

    def __init__(self, name, prefix=""):
        self.file, self.prefix = np.load(GOLDEN / f"{name}.npz"), prefix

    def __contains__(self, name):
        return self.prefix + name in self.file

    def __call__(self, name):
        if name not in self:
            pytest.skip(f"among the shipped vectors there is no {self.prefix}{name}")
        return torch.from_numpy(self.file[self.prefix + name])

    def both(self, *names):
        """Arrays of two rivals, one after the other."""
        return torch.cat([self(name) for name in names])


@dataclass
class Asked:
    """A denoiser of given predictions that remembers of how many rows it was asked."""

    prediction: Tensor
    path: object
    target: str = "eps"
    calls: tuple[int, ...] = ()

    def __call__(self, x_t, t, cond):
        self.calls += (len(x_t),)
        assert x_t.shape == self.prediction.shape
        return self.prediction


class Nobody:
    """A denoiser that must not be asked."""

    path, target = sd_path(), "eps"

    def __call__(self, x_t, t, cond):
        raise AssertionError("asked")


@dataclass(frozen=True)
class GivenDensity:
    """A kernel under which the only element of a step, 0, has the log-density that the denoiser predicts."""

    std: float = 1e-4

    def __call__(self, denoiser, x_t, t, s, cond):
        squared = -2 * (denoiser(x_t, t, cond) + math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return self.std * squared.sqrt(), torch.full_like(x_t, self.std)


def leaf(x):
    return x.clone().requires_grad_(True)


def rows(x_t, x_s, t, s, score, group=None, **more):
    """Return a batch of recorded steps; without ``group`` the first half against the second."""
    group = torch.arange(len(x_t) // 2).repeat(2) if group is None else group
    logp = more.pop("logp", torch.zeros(len(x_t), dtype=x_t.dtype))
    return Batch(Transition(x_t, x_s, t, s, logp), {}, group, score, **{"kernel": DDIM(1.0), **more})


def densities(values, score, group=None, **more):
    """Return a batch whose log-densities are the denoisers' outputs, and a tensor of their shape."""
    zero = torch.zeros_like(values)[:, None]
    return rows(zero, zero, zero[:, 0], zero[:, 0], score, group, kernel=GivenDensity(), **more)


def says(values):
    return Answers(values[:, None], sd_path())


def halves(pairs):
    return torch.cat([torch.ones(pairs), torch.zeros(pairs)])


# ------------------------------------------------------------------------------------------- golden vectors


@pytest.mark.parametrize("prefix", ["s20_", "s50_"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_d3po_golden_step(prefix, guidance):
    """Loss, ratios and gradients of the released code. It counts a tie (sample 4) as log 2 in the mean; here
    it weighs nothing, so sums are compared.
    """
    f = Golden("d3po", prefix)
    time = lambda name: f(name).double().repeat(2) / 1000  # noqa: E731
    score = f.both("rewards_0", "rewards_1")
    if guidance == 1:
        policy, held = (
            leaf(f.both("noise_pred_0", "noise_pred_1")),
            f.both("ref_noise_pred_0", "ref_noise_pred_1"),
        )
    else:
        policy = leaf(f.both("eps_uncond_0", "eps_uncond_1", "eps_text_0", "eps_text_1"))
        held = f.both("ref_eps_uncond_0", "ref_eps_uncond_1", "ref_eps_text_0", "ref_eps_text_1")
    batch = rows(
        f.both("x_t_0", "x_t_1"), f.both("x_prev_0", "x_prev_1"), time("timesteps"), time("prev_timesteps"),
        score, guidance=guidance,
    )  # fmt: skip
    path = sd_path()
    ll = likelihood(Answers(policy, path), Answers(held, path), batch, D3PO_CARD)
    torch.testing.assert_close(ll.policy.detach(), f.both("logp_0", "logp_1"), atol=5e-8, rtol=0)
    torch.testing.assert_close(ll.reference, f.both("logp_ref_0", "logp_ref_1"), atol=5e-8, rtol=0)
    ratio = ll.log_ratio.detach().exp().clamp(0.9, 1.1)
    torch.testing.assert_close(ratio, f.both("ratio_0", "ratio_1"), atol=1e-10, rtol=0)

    step = D3PO()(Answers(policy, path), Answers(held, path), batch, RANDOM)
    ties = int((f("human_prefer") == 0).all(1).sum())
    pairs = len(score) // 2
    assert step.weight.item() == pairs - ties
    total = step.loss.item() * step.weight.item()
    assert (total + ties * math.log(2)) / pairs == pytest.approx(f("loss").item(), abs=1e-10)
    (step.loss * step.weight / pairs).backward()
    names = ["noise_pred"] if guidance == 1 else ["eps_uncond", "eps_text"]
    expected = f.both(*(f"grad_{name}_{i}" for name in names for i in (0, 1)))
    torch.testing.assert_close(policy.grad, expected, atol=1e-10, rtol=0)
    assert expected.abs().max() > 1e-7

    outside = (ll.log_ratio.detach().exp() - 1).abs() > 0.1
    kept = (f("human_prefer") != 0).any(1).repeat(2)
    assert step.metrics["clipped"].item() == pytest.approx(outside[kept].double().mean().item())


@pytest.mark.parametrize("prefix", ["s20_", "s50_"])
def test_d3po_golden_draws(prefix):
    """The schedule, the behaviour policy's draw, float32, and the same arrays read as v."""
    f = Golden("d3po", prefix)
    steps = 20 if prefix == "s20_" else 50
    grid = (timesteps(steps) * 1000).round().long()
    assert grid[:-1].tolist() == f("all_timesteps").tolist()
    used = [grid.tolist().index(int(i)) for i in f("timesteps")]
    assert grid[torch.tensor(used) + 1].tolist() == f("prev_timesteps").tolist()
    one = torch.zeros(steps, 1, dtype=torch.float64)
    _, std = DDIM(1.0).after(sd_path(), one, one, grid[:-1].double() / 1000, grid[1:].double() / 1000)
    torch.testing.assert_close(std[:, 0], f("all_std_dev_t"), atol=1e-10, rtol=0)

    t, s = f("timesteps").double() / 1000, f("prev_timesteps").double() / 1000
    one = torch.zeros(6, 1, dtype=torch.float64)
    for i in (0, 1):
        mean, std = DDIM(1.0)(Answers(f(f"beh_noise_pred_{i}"), sd_path()), f(f"x_t_{i}"), t, s, {})
        torch.testing.assert_close(std.flatten() ** 2, f("variance"), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(mean, f(f"beh_mean_{i}"), atol=1e-10, rtol=0)
        torch.testing.assert_close(mean + std * f(f"z_{i}"), f(f"x_prev_{i}"), atol=1e-10, rtol=0)
        drawn = step_log_density(f(f"x_prev_{i}"), mean, std)
        torch.testing.assert_close(drawn, f(f"logp_sampling_{i}"), atol=5e-8, rtol=0)
        as_v = Answers(f(f"noise_pred_{i}"), sd_path(), "v")
        mean, std = DDIM(1.0)(as_v, f(f"x_t_{i}"), t, s, {})
        logp = step_log_density(f(f"x_prev_{i}"), mean, std)
        torch.testing.assert_close(logp, f(f"logp_if_v_prediction_{i}"), atol=5e-8, rtol=1e-9)
        single = Answers(f(f"noise_pred_{i}").float(), sd_path())
        mean, std = DDIM(1.0)(single, f(f"x_t_{i}").float(), t.float(), s.float(), {})
        assert mean.dtype == torch.float32
        logp = step_log_density(f(f"x_prev_{i}").float(), mean, std)
        torch.testing.assert_close(logp, f(f"logp_f32_{i}"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("file", "prefixes", "method"),
    [
        ("d3po", ("b0p1_",), D3PO()),
        ("d3po", ("b10_",), D3PO(beta=10)),
        ("d3po", ("b10_",), SPO()),
        ("spo", ("b10_", ""), SPO()),
    ],
)
def test_golden_pairs_of_log_densities(file, prefixes, method):
    f = Golden(file, "pair_")
    policy, held = leaf(f.both("logp_w", "logp_l")), f.both("logp_ref_w", "logp_ref_l")
    step = method(says(policy), says(held), densities(policy, halves(len(policy) // 2)), RANDOM)
    name = next((p for p in prefixes if f"{p}loss" in f), prefixes[0])
    assert step.loss.item() == pytest.approx(f(f"{name}loss").item(), abs=1e-10)
    step.loss.backward()
    expected = f.both(f"{name}grad_logp_w", f"{name}grad_logp_l")
    torch.testing.assert_close(policy.grad, expected, atol=1e-10, rtol=0)
    ratio = f.both(f"{name}ratio_w", f"{name}ratio_l")
    edge = torch.isclose(ratio, ratio.new_tensor(0.9)) | torch.isclose(ratio, ratio.new_tensor(1.1))
    assert step.metrics["clipped"].item() == pytest.approx(edge.double().mean().item())


def test_d3po_golden_vector_rewards():
    f = Golden("d3po", "compare_")
    a, b, out = f("a"), f("b"), f("out")
    policy = leaf(torch.zeros(2 * len(a), dtype=torch.float64))
    batch = densities(policy, torch.cat([a, b]))
    D3PO()(says(policy), says(policy.detach()), batch, RANDOM).loss.backward()
    assert torch.equal(-policy.grad.reshape(2, -1).T.sign(), out.to(policy.grad))  # what wins must rise


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_spo_golden_step(guidance):
    """Winner and loser share x_t and one prediction: the toy refuses to be asked about more than one of
    each.
    """
    f = Golden("spo", "step_")
    names = ["noise_pred"] if guidance == 1 else ["eps_uncond", "eps_text"]
    policy, held = leaf(f.both(*names)), f.both(*(f"ref_{name}" for name in names))
    time = lambda name: f(name).double().repeat(2) / 1000  # noqa: E731
    batch = rows(
        f("x_t").repeat(2, 1, 1, 1), f.both("x_prev_w", "x_prev_l"), time("timesteps"),
        time("prev_timesteps"), halves(6), guidance=guidance, state=torch.arange(6).repeat(2),
    )  # fmt: skip
    step = SPO()(Answers(policy, sd_path()), Answers(held, sd_path()), batch, RANDOM)
    assert step.loss.item() == pytest.approx(f("loss").item(), abs=1e-10)
    step.loss.backward()
    expected = f.both(*(f"grad_{name}" for name in names))
    torch.testing.assert_close(policy.grad, expected, atol=1e-10, rtol=0)
    ll = likelihood(Answers(policy, sd_path()), Answers(held, sd_path()), batch, D3PO_CARD)
    torch.testing.assert_close(ll.policy.detach(), f.both("logp_w", "logp_l"), atol=5e-8, rtol=0)
    torch.testing.assert_close(ll.reference, f.both("logp_ref_w", "logp_ref_l"), atol=5e-8, rtol=0)
    ratio = ll.log_ratio.detach().exp().clamp(0.9, 1.1)
    torch.testing.assert_close(ratio, f.both("ratio_w", "ratio_l"), atol=1e-10, rtol=0)
    per_sample = -torch.nn.functional.logsigmoid(10 * (ratio[:6].log() - ratio[6:].log()))
    torch.testing.assert_close(per_sample, f("loss_per_sample"), atol=1e-10, rtol=0)


def test_spo_golden_gradients_of_log_densities():
    f = Golden("spo", "step_")
    policy, held = leaf(f.both("logp_w", "logp_l")), f.both("logp_ref_w", "logp_ref_l")
    SPO()(says(policy), says(held), densities(policy, halves(6)), RANDOM).loss.backward()
    torch.testing.assert_close(policy.grad, f.both("grad_logp_w", "grad_logp_l"), atol=1e-10, rtol=0)
    assert policy.grad[2] == policy.grad[8] == 0  # both clipped


def test_spo_golden_schedule():
    f = Golden("spo", "all_")
    grid = (timesteps(20) * 1000).round().long()
    assert grid[:-1].tolist() == f("timesteps").tolist() and grid[1:].tolist() == f("prev_timesteps").tolist()
    one = torch.zeros(20, 1, dtype=torch.float64)
    _, std = DDIM(1.0).after(sd_path(), one, one, grid[:-1].double() / 1000, grid[1:].double() / 1000)
    torch.testing.assert_close(std[:, 0], f("std_dev_t"), atol=1e-10, rtol=0)
    torch.testing.assert_close(std[:, 0] ** 2, f("variance"), atol=1e-10, rtol=0)


@pytest.mark.parametrize(("name", "threshold"), [("thr0p3", 0.3), ("thr0p4", 0.4)])
def test_spo_golden_verdicts(name, threshold):
    f = Golden("spo", "compare_")
    pair, score = best_and_worst(f("scores").T, threshold)
    assert torch.equal(pair.T, f(f"{name}_indices"))
    assert torch.equal(score[:, 0] > score[:, 1], f(f"{name}_valid"))


def ddpo_times(f):
    t = f("timesteps")
    return t.double() / 1000, (t - 20).clamp(min=0).double() / 1000


def test_ddpo_golden():
    f = Golden("ddpo")
    t, s = ddpo_times(f)
    eps, advantage = leaf(f("eps")), f("ppo_adv")
    batch = rows(
        f("x_t"), f("eta1.0_fixed_prev"), t, s, advantage, torch.arange(5), logp=f("ppo_old_logp"),
        extra={"advantage": advantage},
    )  # fmt: skip
    step = DDPO(kl=None)(Answers(eps, sd_path()), Nobody(), batch, RANDOM)
    assert step.loss.item() == pytest.approx(f("ppo_loss").item(), abs=1e-7)
    step.loss.backward()
    torch.testing.assert_close(eps.grad, f("ppo_grad"), atol=1e-9, rtol=1e-6)
    ratio = f("ppo_ratio")
    assert step.metrics["ratio"].item() == pytest.approx(ratio.mean().item(), abs=1e-7)
    assert step.metrics["clip_fraction"].item() == pytest.approx(
        ((ratio - 1).abs() > 1e-4).double().mean().item()
    )
    assert step.metrics["advantage"].item() == pytest.approx(advantage.clamp(-5, 5).mean().item())
    assert step.weight.item() == 5


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_ddpo_golden_densities(eta):
    f = Golden("ddpo")
    (t, s), own = ddpo_times(f), Golden("ddpo", f"eta{eta}_")
    for drawn, logp in (("prev_sample", "logp_own"), ("fixed_prev", "logp_fixed")):
        eps = leaf(f("eps"))
        mean, std = DDIM(eta)(Answers(eps, sd_path()), f("x_t"), t, s, {})
        density = step_log_density(own(drawn), mean, std)
        torch.testing.assert_close(density.detach(), own(logp), atol=1e-6, rtol=0)
    density.sum().backward()
    torch.testing.assert_close(eps.grad, own("dlogp_deps"), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("clip", [1e-4, 1e-5])
def test_flow_grpo_is_ddpo_on_a_flow(clip):
    """Its policy loss is ours. Its KL divides by the variance without the step's length, ours is the exact
    one: theirs is ours times t - s.
    """
    f = Golden("flow_grpo_sde_step")
    sigmas, index = f("sigmas"), f("step_index")
    t, s = sigmas[index], sigmas[index + 1]
    v, reference = leaf(f("v")), Answers(f("grpo_v_ref"), RectifiedFlow(), "flow")
    batch = rows(
        f("x_t"), f("sde_nl0.7_fixed_prev"), t, s, f("grpo_adv"), torch.arange(5), logp=f("grpo_old_logp"),
        extra={"advantage": f("grpo_adv")}, kernel=FlowSDE(0.7),
    )  # fmt: skip
    policy = Answers(v, RectifiedFlow(), "flow")
    step = DDPO(clip=clip)(policy, reference, batch, RANDOM)
    ll = likelihood(policy, reference, batch, D3PO_CARD)
    torch.testing.assert_close(ll.policy.detach(), f("grpo_new_logp"), atol=1e-6, rtol=0)
    kl = (ll.kl * (t - s)).mean()
    for beta in (0.0, 0.04):
        case = Golden("flow_grpo_sde_step", f"grpo_b{beta}_c{'0.0001' if clip == 1e-4 else '1e-05'}_")
        if "loss" not in case:
            continue
        v.grad = None
        assert step.loss.item() == pytest.approx(case("policy_loss").item(), abs=1e-6)
        if beta:
            assert kl.item() == pytest.approx(case("kl").item(), abs=1e-9)
        total = step.loss + beta * kl
        assert total.item() == pytest.approx(case("loss").item(), abs=1e-6)
        total.backward(retain_graph=True)
        torch.testing.assert_close(v.grad, case("grad"), atol=1e-8, rtol=1e-5)


# ------------------------------------------------------------------------------- derived without those files


def drawn(seed=0, groups=3, rivals=2, far=0.02):
    """Return steps near those of policy and reference, so that the clip holds some ratios and not others."""
    g = torch.Generator().manual_seed(seed)
    n = groups * rivals
    normal = lambda: torch.randn(n, 2, 3, 3, generator=g, dtype=torch.float64)  # noqa: E731
    x_t, eps = normal(), normal()
    held, x_s = eps + far * normal(), 0.9 * x_t + 0.3 * normal()
    t = torch.tensor([0.951, 0.451, 0.051, 0.701], dtype=torch.float64)[:groups].repeat_interleave(rivals)
    score = torch.rand(n, generator=g)
    group = torch.arange(groups).repeat_interleave(rivals)
    return rows(x_t, x_s, t, t - 0.05, score, group), eps, held


def by_numpy(batch, eps, held):
    """(log p, log p_ref, KL, d log p / d eps) of eta = 1 steps, from the formulas of the papers."""
    table = sd_path().alphas_cumprod.double().numpy()
    index = lambda v: np.maximum(np.rint(v.numpy() * 1000).astype(int), 0)  # noqa: E731
    a, ap = (table[index(v)][:, None, None, None] for v in (batch.x.t, batch.x.s))
    std = np.sqrt((1 - ap) / (1 - a) * (1 - a / ap))
    x_t, x_s = batch.x.x_t.numpy(), batch.x.x_s.numpy()
    slope = np.sqrt(1 - ap - std**2) - np.sqrt(ap * (1 - a) / a)
    mean, other = (np.sqrt(ap / a) * x_t + slope * e.numpy() for e in (eps, held))
    axes = (1, 2, 3)
    logs = [
        (-((x_s - m) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)).mean(axes)
        for m in (mean, other)
    ]
    kl = ((mean - other) ** 2 / (2 * std**2)).mean(axes)
    return *logs, kl, (x_s - mean) / std**2 * slope / x_t[0].size


@pytest.mark.parametrize(("method", "beta"), [(D3PO(beta=0.7), 0.7), (SPO(beta=10.0), 10.0)])
@pytest.mark.parametrize("rivals", [2, 3])
def test_pairs_against_numpy(method, beta, rivals):
    """Every two rivals, the clip, and the gradient that it takes away, in independent numpy."""
    batch, eps, held = drawn(groups=3, rivals=rivals)
    logp, reference, kl, slope = by_numpy(batch, eps, held)
    raw = logp - reference
    inside = np.abs(np.exp(raw) - 1) <= 0.1
    assert inside.any() and not inside.all()
    clipped = np.log(np.clip(np.exp(raw), 0.9, 1.1))
    losses, weights, terms = [], np.zeros(len(raw)), []
    score = batch.score.numpy()
    for i in range(len(raw)):
        for j in range(i + 1, len(raw)):
            if batch.group[i] != batch.group[j]:
                continue
            w, lost = (i, j) if score[i] > score[j] else (j, i)
            h = beta * (clipped[w] - clipped[lost])
            losses.append(np.log1p(np.exp(-h)))
            weights[w] -= beta / (1 + np.exp(h))
            weights[lost] += beta / (1 + np.exp(h))
            terms.append((w, lost))
    gradient = (weights * inside)[:, None, None, None] * slope / len(losses)

    prediction = leaf(eps)
    step = method(Answers(prediction, sd_path()), Answers(held, sd_path()), batch, RANDOM)
    step.loss.backward()
    assert step.loss.item() == pytest.approx(np.mean(losses), abs=1e-12)
    np.testing.assert_allclose(prediction.grad.numpy(), gradient, atol=1e-12)
    won, lost = (np.array(side) for side in zip(*terms, strict=True))
    expected = {
        "rewards/chosen": beta * clipped[won].mean(),
        "rewards/rejected": beta * clipped[lost].mean(),
        "rewards/margins": beta * (clipped[won] - clipped[lost]).mean(),
        "rewards/accuracies": (raw[won] > raw[lost]).mean(),
        "log_ratios/chosen": raw[won].mean(),
        "log_ratios/rejected": raw[lost].mean(),
        "kl": (kl[won] + kl[lost]).mean() / 2,
        "clipped": (~inside)[np.concatenate([won, lost])].mean(),
        "loss": np.mean(losses),
    }
    assert {k: v.item() for k, v in step.metrics.items()} == pytest.approx(expected, abs=1e-10)
    assert step.weight.item() == len(losses)


@pytest.mark.parametrize("method", [D3PO(), SPO(), DDPO()])
def test_a_penalty_adds_its_weight_of_the_kl(method):
    batch, eps, held = drawn()
    batch = replace(batch, extra={"advantage": torch.randn(6, generator=torch.Generator().manual_seed(0))})
    run = lambda m, e: m(Answers(e, sd_path()), Answers(held, sd_path()), batch, RANDOM)  # noqa: E731
    prediction, other = leaf(eps), leaf(eps)
    plain, penal = run(method, prediction), run(replace(method, kl=0.3), other)
    assert penal.metrics["kl"].item() == plain.metrics["kl"].item() > 0
    assert penal.loss.item() - plain.loss.item() == pytest.approx(0.3 * plain.metrics["kl"].item(), abs=1e-12)
    plain.loss.backward()
    penal.loss.backward()
    # of one step: KL = slope^2 (eps - held)^2 / (2 std^2), a mean over elements and then over the steps
    *_, kl, _ = by_numpy(batch, eps, held)
    per_row = torch.from_numpy(2 * kl)[:, None, None, None] / (eps - held).square().mean((1, 2, 3), True)
    expected = 0.3 * per_row * (eps - held) / eps[0].numel() / len(eps)
    torch.testing.assert_close(other.grad - prediction.grad, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("method", [D3PO(kl=0.2), SPO(kl=0.2), DDPO(kl=0.2)])
def test_any_split_gives_the_same_weighted_loss(method):
    """Ragged ties included: the second pair is one."""
    batch, eps, held = drawn(groups=4)
    score = batch.score.clone()
    score[3] = score[2]
    batch = replace(batch, score=score, extra={"advantage": torch.linspace(-1, 2, 8)})

    def sums(parts):
        total = count = 0.0
        for first, last in parts:
            index = torch.arange(2 * first, 2 * last)
            part = replace(batch.select(index), group=torch.arange(last - first).repeat_interleave(2))
            step = method(Answers(eps[index], sd_path()), Answers(held[index], sd_path()), part, RANDOM)
            total, count = total + (step.loss * step.weight).item(), count + step.weight.item()
        return total / count, count

    whole, weight = sums([(0, 4)])
    assert sums([(0, 1), (1, 2), (2, 4)]) == (pytest.approx(whole, abs=1e-12), weight)
    assert weight == (8 if isinstance(method, DDPO) else 3)


@pytest.mark.parametrize("method", [D3PO(), SPO()])
def test_outside_the_clip_there_is_no_gradient_whichever_way(method):
    ratios = torch.tensor([0.3, -0.2, -0.3, 0.2, 0.05, 0.04], dtype=torch.float64)  # w, l, w, l, w, l
    policy = leaf(ratios)
    batch = densities(policy, torch.tensor([1.0, 0, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2]))
    step = method(says(policy), says(torch.zeros(6, dtype=torch.float64)), batch, RANDOM)
    step.loss.backward()
    assert policy.grad[:4].abs().max() == 0 and policy.grad[4] < 0 < policy.grad[5]
    assert step.metrics["clipped"].item() == pytest.approx(4 / 6)
    assert step.metrics["rewards/accuracies"].item() == pytest.approx(2 / 3)
    top, bottom = method.beta * math.log(1.1), method.beta * math.log(0.9)
    both = [math.log1p(math.exp(-h)) for h in (top - bottom, bottom - top, 0.01 * method.beta)]
    assert step.loss.item() == pytest.approx(sum(both) / 3, abs=1e-12)


@pytest.mark.parametrize("method", [D3PO(), SPO()])
def test_policy_equal_to_reference_is_log_two_and_a_tie_is_nothing(method):
    batch, eps, _ = drawn()
    step = method(Answers(eps, sd_path()), Answers(eps, sd_path()), batch, RANDOM)
    assert step.loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert step.metrics["rewards/accuracies"].item() == 0.5
    assert step.metrics["kl"].item() == 0 and step.metrics["clipped"].item() == 0
    prediction = leaf(eps)
    tied = replace(batch, score=torch.ones(6))
    step = replace(method, kl=1.0)(Answers(prediction, sd_path()), Answers(eps + 1, sd_path()), tied, RANDOM)
    step.loss.backward()
    assert step.loss.item() == 0 and step.weight.item() == 0 and prediction.grad.abs().max() == 0


def test_several_rewards_are_compared_by_pareto():
    """Of three pairs one is won by the first (ahead or equal in all), one by the second, one is a tie."""
    score = torch.tensor([[1.0, 2], [1, 1], [0, 3], [1, 3], [2, 0], [0, 2]])
    policy = leaf(torch.zeros(6, dtype=torch.float64))
    batch = densities(policy, score, torch.tensor([0, 0, 1, 1, 2, 2]))
    step = D3PO()(says(policy), says(policy.detach()), batch, RANDOM)
    step.loss.backward()
    assert step.weight.item() == 2
    assert policy.grad.sign().tolist() == [-1, 1, 1, -1, 0, 0]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("shared", [True, False])
def test_rivals_of_one_state_are_asked_once(guidance, shared):
    batch, eps, held = drawn()
    if shared:
        same = torch.arange(0, 6, 2).repeat_interleave(2)
        x = batch.x._replace(x_t=batch.x.x_t[same])
        cond = {"text": torch.arange(3.0).repeat_interleave(2)[:, None]}
        batch = replace(batch, x=x, cond=cond, state=torch.tensor([5, 5, 0, 0, 2, 2]))
        # states in order of their ids: 0, 2, 5
        eps, held = (v[torch.tensor([2, 4, 0])] for v in (eps, held))
        batch = replace(batch, negative={"text": torch.full((6, 1), -1.0)})
    half = 1 if guidance == 1 else 2
    eps, held = eps.repeat(half, 1, 1, 1), held.repeat(half, 1, 1, 1)
    batch = replace(batch, guidance=guidance)
    policy, reference = Asked(eps, sd_path()), Asked(held, sd_path())
    step = SPO()(policy, reference, batch, RANDOM)
    expected = half * (3 if shared else 6)
    assert policy.calls == (expected,) and reference.calls == (expected,)
    if shared:
        wide = [v[:3].repeat(half, 1, 1, 1)[torch.tensor([2, 2, 0, 0, 1, 1])] for v in (eps, held)]
        apart = replace(batch, state=None, guidance=1.0)
        alone = SPO()(*(Answers(v, sd_path()) for v in wide), apart, RANDOM)
        assert step.loss.item() == pytest.approx(alone.loss.item(), abs=1e-12)


def test_guidance_pairs_each_state_with_its_own_negative():
    """The network's two halves are asked about the right texts, and combined as guidance combines them."""

    class Reads:
        path, target = sd_path(), "eps"

        def __call__(self, x_t, t, cond):
            self.texts = cond["text"][:, 0].tolist()
            return cond["text"][:, :, None, None].expand_as(x_t).double()

    batch, *_ = drawn()
    batch = replace(
        batch, cond={"text": torch.tensor([[1.0], [1], [2], [2], [3], [3]])}, guidance=3.0,
        negative={"text": torch.tensor([[-1.0], [-1], [-2], [-2], [-3], [-3]])},
        state=torch.tensor([0, 0, 1, 1, 2, 2]),
    )  # fmt: skip
    network = Reads()
    out = as_drawn(network, batch)(batch.x.x_t, batch.x.t, batch.cond)
    assert network.texts == [-1, -2, -3, 1, 2, 3]
    assert out[:, 0, 0, 0].tolist() == [5, 5, 10, 10, 15, 15]


@pytest.mark.parametrize("method", [D3PO(kl=0.1), SPO(kl=0.1), DDPO(kl=0.1)])
def test_a_recorded_reference_is_not_asked_again(method):
    batch, eps, held = drawn()
    batch = replace(batch, extra={"advantage": torch.linspace(-2, 1, 6)})
    x = batch.x
    mean, _ = DDIM(1.0)(Answers(held, sd_path()), x.x_t, x.t, x.s, {})
    known = replace(batch, extra={**batch.extra, "reference_mean": mean})
    asks = method(Answers(eps, sd_path()), Answers(held, sd_path()), batch, RANDOM)
    knows = method(Answers(eps, sd_path()), Nobody(), known, RANDOM)
    assert torch.equal(asks.loss, knows.loss) and asks.metrics == knows.metrics


def test_ddpo_by_hand():
    """max(-A r, -A clip(r)): a gradient is lost only where the step has gone far enough the right way."""
    moved, old = torch.tensor([0.3, -0.3, 0.3, -0.3, 0.01]), torch.tensor([0.5, 0.1, -2.0, 0.2, 0.3])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0, 9.0])
    policy = leaf((old + moved).double())
    batch = densities(policy, advantage, torch.arange(5), logp=old.double(), extra={"advantage": advantage})
    step = DDPO(clip=0.1, advantage_clip=5.0, kl=None)(says(policy), Nobody(), batch, RANDOM)
    r = np.exp(moved.double().numpy())
    losses = [-1.1, -r[1], r[2], 0.9, -5 * r[4]]
    assert step.loss.item() == pytest.approx(np.mean(losses), abs=1e-6)
    step.loss.backward()
    expected = np.array([0, -r[1], r[2], 0, -5 * r[4]]) / 5
    np.testing.assert_allclose(policy.grad.numpy(), expected, atol=1e-6)
    assert "kl" not in step.metrics
    assert step.metrics["clip_fraction"].item() == pytest.approx(0.8)
    assert step.metrics["ratio"].item() == pytest.approx(r.mean(), abs=1e-6)
    assert step.metrics["advantage"].item() == pytest.approx(1.0)


def test_the_policy_that_drew_has_ratio_one():
    batch, eps, held = drawn()
    x = batch.x
    logp = step_log_density(x.x_s, *DDIM(1.0)(Answers(eps, sd_path()), x.x_t, x.t, x.s, {}))
    advantage = torch.tensor([1.0, -1, 2, -2, 0.5, 0.5], dtype=torch.float64)
    batch = replace(batch, x=x._replace(logp=logp), extra={"advantage": advantage})
    step = DDPO()(Answers(eps, sd_path()), Answers(held, sd_path()), batch, RANDOM)
    assert step.metrics["ratio"].item() == 1 and step.metrics["clip_fraction"].item() == 0
    assert step.loss.item() == pytest.approx(-advantage.mean().item(), abs=1e-12)
    held_mean, _ = DDIM(1.0)(Answers(held, sd_path()), x.x_t, x.t, x.s, {})
    mean, std = DDIM(1.0)(Answers(eps, sd_path()), x.x_t, x.t, x.s, {})
    assert step.metrics["kl"].item() == pytest.approx(step_kl(mean, held_mean, std).mean().item())


def test_half_precision_states_are_scored_in_float32():
    batch, eps, held = drawn()
    x = Transition(*(v.half() if v.ndim > 1 else v.float() for v in batch.x))
    batch = replace(batch, x=x)
    step = D3PO()(Answers(eps.half(), sd_path()), Answers(held.half(), sd_path()), batch, RANDOM)
    assert step.loss.dtype == torch.float32 and torch.isfinite(step.loss)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "d3po", "beta": 0}, "method.beta=0.*more than 0"),
        ({"type": "d3po", "clip": 1}, "method.clip=1.*less than 1"),
        ({"type": "spo", "clip": 0}, "method.clip=0.*more than 0"),
        ({"type": "spo", "kl": -1}, "method.kl=-1.*0 or more"),
        ({"type": "ddpo", "kl": -1}, "method.kl=-1.*null"),
        ({"type": "ddpo", "clip": 2}, "method.clip=2"),
        ({"type": "ddpo", "advantage_clip": 0}, "method.advantage_clip=0"),
    ],
)
def test_bad_values_are_refused_with_the_place(values, words):
    with pytest.raises(UserError, match=words):
        build(values)


def test_who_needs_a_reference():
    assert build({"type": "d3po", "loss": "ipo"}) == D3PO(loss=IPO())
    assert D3PO().needs_reference and SPO().needs_reference and DDPO().needs_reference
    assert build({"type": "ddpo", "kl": None}).needs_reference is False
    assert {n: REGISTRY[n].rollout for n in ("d3po", "spo", "ddpo", "dpo")} == {
        "d3po": "trajectories", "spo": "tree", "ddpo": "trajectories", "dpo": "samples",
    }  # fmt: skip


@pytest.mark.parametrize(("method", "shape"), [(D3PO(), "trajectories"), (SPO(), "tree"), (DDPO(), "traj")])
def test_an_offline_batch_is_told_what_is_missing(method, shape):
    batch, eps, _ = drawn()
    denoiser = Answers(eps, sd_path())
    offline = Batch(batch.x.x_t, {}, batch.group, batch.score)
    for bad in (offline, replace(batch, kernel=None)):
        with pytest.raises(UserError, match=f"learns from rollouts.*`rollout` section.*{shape}"):
            method(denoiser, denoiser, bad, RANDOM)
    if isinstance(method, DDPO):
        with pytest.raises(UserError, match=r"advantages.*rollout.advantage"):
            method(denoiser, denoiser, batch, RANDOM)
