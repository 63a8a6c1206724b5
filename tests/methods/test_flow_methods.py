"""Flow-GRPO, AWM, DiffusionNFT and DGPO by independent arithmetic and against reference implementations."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.guidance import Guided
from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM, FlowSDE
from diffalign.errors import UserError
from diffalign.losses.surrogates import elbo_weight, surrogate_log_density
from diffalign.methods import build
from diffalign.methods._multi_time import Stratified, noised_rows
from diffalign.methods._trailing import Followed, Trail
from diffalign.methods.awm import AWM
from diffalign.methods.dgpo import DGPO
from diffalign.methods.diffusion_nft import DiffusionNFT
from diffalign.methods.flow_grpo import FlowGRPO
from diffalign.types import Batch, Transition
from tests.helpers import VECTORS, Answers

FLOW = RectifiedFlow()
STEPS = VECTORS / "flow_grpo_sde_step.npz"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(v, kernel, t, s, advantage, moved=0.0):
    """Return steps drawn by a velocity ``v``, with the densities of a slightly different policy."""
    x, z = normal(*v.shape, seed=1), normal(*v.shape, seed=2)
    mean, std = kernel(Answers(v, FLOW, "flow"), x, t, s, {})
    after = mean + std * z
    logp = (-((after - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))
    return Batch(
        Transition(x, after, t, s, logp + moved),
        {},
        torch.arange(len(v)),
        torch.zeros(len(v)),
        extra={"advantage": advantage},
        kernel=kernel,
    )


@pytest.mark.parametrize("form", ["sde", "cps", "dance"])
@pytest.mark.parametrize("kl_form", ["published", "exact"])
def test_flow_grpo_by_numpy(form, kl_form):
    t, s = (torch.tensor(v, dtype=torch.float64) for v in ([1.0, 0.7, 0.3], [0.9, 0.5, 0.1]))
    v, v_ref, moved = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=5), torch.tensor([5e-5, -3e-4, 2e-4])
    batch = recorded(v, FlowSDE(0.7, form), t, s, torch.tensor([1.0, -0.5, 7.0]), moved)
    method = FlowGRPO(clip=1e-4, kl=0.04, kl_form=kl_form)
    step = method(Answers(v, FLOW, "flow"), Answers(v_ref, FLOW, "flow"), batch, torch.Generator())

    a, ratio = np.array([1.0, -0.5, 5.0]), np.exp(-moved.numpy())
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, 1 - 1e-4, 1 + 1e-4)).mean()
    kls = []
    for i, (now, then) in enumerate(zip(t.tolist(), s.tolist(), strict=True)):
        dv = (v[i] - v_ref[i]).numpy()
        if form == "cps":  # x0 and eps estimates move by -t dv and (1 - t) dv
            angle = 0.35 * math.pi
            dmu, std = ((1 - then) * -now + then * math.cos(angle) * (1 - now)) * dv, then * math.sin(angle)
            length = 1
        else:
            g2 = 0.49 * (1 if form == "dance" else now / (1 - (then if now == 1 else now)))
            dmu, std = dv * (1 + g2 * (1 - now) / (2 * now)) * (then - now), math.sqrt(g2)
            length = now - then
        exact = form == "cps" or kl_form == "exact"
        kls.append((dmu**2).mean() / (2 * std**2) / (length if exact else 1))
    assert step.loss.item() == pytest.approx(policy + 0.04 * np.mean(kls), abs=1e-7)
    assert step.metrics["kl"].item() == pytest.approx(np.mean(kls), abs=1e-7)
    assert step.metrics["ratio"].item() == pytest.approx(ratio.mean()) and step.weight == 3


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("clip", [1e-4, 1e-5])
def test_flow_grpo_against_the_reference_implementation(beta, clip):
    f = np.load(STEPS)
    prefix = f"grpo_b{beta}_c{'0.0001' if clip == 1e-4 else '1e-05'}_"
    if prefix + "loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix}loss")
    get = lambda name: torch.from_numpy(f[name])  # noqa: E731
    index, sigmas = get("step_index"), get("sigmas")
    x = Transition(
        get("x_t"), get("sde_nl0.7_fixed_prev"), sigmas[index], sigmas[index + 1], get("grpo_old_logp")
    )
    batch = Batch(
        x, {}, torch.arange(5), torch.zeros(5), extra={"advantage": get("grpo_adv")}, kernel=FlowSDE(0.7)
    )
    v = get("v").requires_grad_(True)
    reference = Answers(get("grpo_v_ref"), FLOW, "flow")
    step = FlowGRPO(clip=clip, kl=beta)(Answers(v, FLOW, "flow"), reference, batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(f[prefix + "loss"].item(), abs=1e-6)
    assert step.metrics["policy_loss"].item() == pytest.approx(f[prefix + "policy_loss"].item(), abs=1e-6)
    if prefix + "kl" in f:
        assert step.metrics["kl"].item() == pytest.approx(f[prefix + "kl"].item(), rel=1e-6)
    torch.testing.assert_close(v.grad, get(prefix + "grad"), atol=1e-7, rtol=1e-6)
    known = replace(batch, extra={**batch.extra, "reference_mean": get("grpo_mean_ref")})
    again = FlowGRPO(clip=clip, kl=beta)(Answers(v, FLOW, "flow"), None, known, torch.Generator())
    assert again.loss.item() == pytest.approx(step.loss.item(), abs=1e-6)


@dataclass
class Texted:
    """A velocity that the condition's text adds a trained number to; it notes who wants a gradient."""

    weight: torch.Tensor
    path = FLOW
    target = "flow"

    def __call__(self, x_t, t, cond):
        return self.weight * (cond["text"].reshape(-1, 1, 1, 1) + 0.3 * x_t)


def test_what_guidance_guides_away_from_has_no_gradient():
    """d(guided)/dw = g d(positive)/dw when held, and (1 - g) d(negative)/dw more when not; one value."""
    x, g = normal(2, 1, 2, 2), 4.5
    cond, negative = {"text": torch.tensor([1.0, 2.0]).double()}, {"text": torch.tensor([0.5, 0.5]).double()}
    t = torch.full((2,), 0.5, dtype=torch.float64)
    found = {}
    for held in (True, False):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        value = Guided(Texted(w), negative, g, held)(x, t, cond)
        value.sum().backward()
        found[held] = (value.detach(), w.grad.item())
    torch.testing.assert_close(found[True][0], found[False][0])
    positive, away = (
        (text.reshape(2, 1, 1, 1) + 0.3 * x).sum().item() for text in (cond["text"], negative["text"])
    )
    assert found[True][1] == pytest.approx(g * positive)
    assert found[False][1] == pytest.approx(g * positive + (1 - g) * away)


def test_flow_grpo_with_and_without_the_negatives_gradient():
    v, t = normal(2, 1, 2, 2), torch.tensor([0.8, 0.6], dtype=torch.float64)
    batch = recorded(v, FlowSDE(0.7), t, t - 0.2, torch.tensor([1.0, -1.0]).double())
    batch = replace(
        batch,
        cond={"text": torch.tensor([1.0, 2.0]).double()},
        negative={"text": torch.zeros(2).double()},
        guidance=4.5,
    )
    values, grads = [], []
    for hold in (True, False):
        w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        step = FlowGRPO(clip=0.5, kl=None, hold_negative=hold)(Texted(w), None, batch, torch.Generator())
        step.loss.backward()
        values.append(step.loss.item())
        grads.append(w.grad.item())
    assert values[0] == pytest.approx(values[1]) and abs(grads[0] - grads[1]) > 1e-3


def test_what_flow_grpo_refuses():
    v, t = normal(2, 1, 2, 2), torch.tensor([0.8, 0.6], dtype=torch.float64)
    batch = recorded(v, FlowSDE(0.7), t, t - 0.2, torch.ones(2))
    policy, g = Answers(v, FLOW, "flow"), torch.Generator()
    with pytest.raises(UserError, match="stochastic steps of a flow; allowed elsewhere: ddpo"):
        FlowGRPO()(policy, policy, replace(batch, kernel=DDIM(1.0)), g)
    with pytest.raises(UserError, match="advantages, and this batch has none"):
        FlowGRPO()(policy, policy, replace(batch, extra={}), g)
    with pytest.raises(UserError, match="this batch holds finished samples"):
        FlowGRPO()(policy, policy, Batch(v, {}, torch.arange(2), torch.ones(2)), g)
    for bad in ({"kl": -1}, {"clip": 0}, {"advantage_clip": 0}, {"kl_form": "correct"}):
        with pytest.raises(UserError, match=f"method.{next(iter(bad))}"):
            build({"type": "flow_grpo", **bad})


class Draws:
    """A ``Random`` that gives one noise (groups, times, members, *d), and uniforms."""

    def __init__(self, noise, u=None):
        self.noise, self.u = noise, u

    def normal(self, count, shape=()):
        assert self.noise.shape == (count, *shape)
        return self.noise

    def uniform(self, count, shape=()):
        return self.u.reshape(1, -1).expand(count, -1) if self.u.ndim == 1 else self.u


@dataclass(frozen=True)
class Times:
    """Times (groups, S) that are given."""

    t: tuple[tuple[float, ...], ...]

    def __call__(self, count, generator, grid):
        return torch.tensor(self.t, dtype=torch.float64)


def sampled(x0, advantage, group=None, grid=None):
    group = torch.arange(len(x0)) if group is None else group
    return Batch(x0, {}, group, torch.zeros(len(x0)), extra={"advantage": advantage}, grid=grid)


def answers(array):
    return Answers(array if isinstance(array, torch.Tensor) else torch.from_numpy(array), FLOW, "flow")


S, B = 2, 3
T = ((0.9, 0.3), (0.8, 0.25), (0.5, 1.0))


def rows_by_hand():
    """(x0, noise (groups, S, 1, *d), x_t, target, t) of three samples at two times each, times slowest."""
    x0, noise = normal(B, 2, 4, 4, seed=11), normal(B, S, 1, 2, 4, 4, seed=12)
    x_t, target, times = [], [], []
    for time in range(S):
        for i in range(B):
            t, eps = T[i][time], noise[i, time, 0]
            x_t.append((1 - t) * x0[i] + t * eps)
            target.append(eps - x0[i])
            times.append(t)
    return x0, noise, torch.stack(x_t), torch.stack(target), torch.tensor(times, dtype=torch.float64)


@dataclass
class Checked:
    """Answers, after a look at the question."""

    prediction: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    path = FLOW
    target = "flow"

    def __call__(self, x_t, t, cond):
        torch.testing.assert_close(x_t, self.x_t)
        torch.testing.assert_close(t, self.t)
        return self.prediction


def played(seed=20):
    """(policy's prediction, base's, trailing's), the reference that knows both, and the question's check."""
    x0, noise, x_t, target, t = rows_by_hand()
    said = [normal(S * B, 2, 4, 4, seed=seed + i) * 0.2 + target for i in range(3)]
    v = said[0].clone().requires_grad_(True)
    ask = lambda prediction: Checked(prediction, x_t, t)  # noqa: E731
    return x0, noise, x_t, target, t, v, said[1], said[2], ask, Followed(ask(said[1]), ask(said[2]))


WEIGHED = {
    "uniform": lambda m, t: -m,
    "t": lambda m, t: -m * t,
    "t2": lambda m, t: -m * t**2,
    "huber": lambda m, t: -(np.sqrt(m + 1e-10) - 1e-5) * t,
    "ghuber": lambda m, t: -((m + 1e-10) ** 0.25 - (1e-10) ** 0.25) * t / 0.25,
}


@pytest.mark.parametrize("weighting", WEIGHED)
@pytest.mark.parametrize("order", ["exp_first", "sum_first"])
@pytest.mark.parametrize("old", ["current", "trailing"])
def test_awm_by_numpy(weighting, order, old):
    x0, noise, _, target, t, v, base, ema, ask, reference = played()
    advantage = torch.tensor([1.0, -0.5, 9.0], dtype=torch.float64)
    method = AWM(
        weighting, order=order, old=old, clip=0.02, kl=0.3, ema_kl=2.0, kl_weight="elbo", time=Times(T)
    )
    step = method(ask(v), reference, sampled(x0, advantage), Draws(noise))

    squared = lambda a, b: ((a - b) ** 2).mean((1, 2, 3)).detach().numpy()  # noqa: E731
    now, ema_now = (WEIGHED[weighting](squared(p, target), t.numpy()).reshape(S, B) for p in (v, ema))
    gap = now - (ema_now if old == "trailing" else now)
    ratio = np.exp(gap if order == "exp_first" else gap.mean(0, keepdims=True))
    a = np.array([0.2, -0.1, 1.0])
    policy = np.maximum(-a * ratio, -a * np.clip(ratio, 0.98, 1.02)).mean()
    g2 = 0.49 * t.numpy() / (1 - np.minimum(t.numpy(), 0.99))
    kl, ema_kl = (squared(v, base) / (2 * g2)).mean(), squared(v, ema).mean()
    assert step.loss.item() == pytest.approx(policy + 0.3 * kl + 2 * ema_kl, rel=1e-9)
    assert step.metrics["kl"].item() == pytest.approx(kl) and step.weight == B
    if old == "trailing":
        assert step.metrics["ratio"].item() == pytest.approx(ratio.mean())


def test_awms_gradient_is_advantage_weighted_matching():
    """With l_old the present one: the gradient of -A l alone, whatever the clip."""
    x0, noise, _, target, t, v, _, _, ask, reference = played()
    advantage = torch.tensor([5.0, -2.5, 1.0], dtype=torch.float64)
    step = AWM("t", kl=0, ema_kl=0, clip=1e-3, time=Times(T))(
        ask(v), reference, sampled(x0, advantage), Draws(noise)
    )
    step.loss.backward()
    d = v[0].numel()
    per_row = (advantage / 5).repeat(S) * t / (S * B)
    expected = per_row.reshape(-1, 1, 1, 1) * 2 * (v.detach() - target) / d
    torch.testing.assert_close(v.grad, expected, atol=1e-12, rtol=1e-9)


AWM_GOLDEN = VECTORS / "awm.npz"
CASES = [
    (order, policy, weight, clip)
    for order in ("exp_first", "sum_first")
    for policy in ("on", "off")
    for weight in ("Uniform", "ELBO")
    for clip in (1, 1e-4)
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_awm_against_the_reference_implementation(case):
    """Off policy the reference has an old and an averaged policy: calls that differ by who trails."""
    order, policy, weight, clip = case
    f = np.load(AWM_GOLDEN)
    prefix = f"{order}_{policy}_{weight}_clip{clip if clip == 1 else '0.0001'}_"
    if prefix + "loss" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix}loss")
    times = Times(tuple(map(tuple, f["timesteps"].reshape(6, 3).T.tolist())))
    noise = torch.from_numpy(f["noise"]).unflatten(0, (6, 3)).transpose(0, 1)[:, :, None]
    batch = sampled(torch.from_numpy(f["clean_latents"])[:3], torch.from_numpy(f["advantages"]))
    v = torch.from_numpy(f["model_output"]).requires_grad_(True)
    kind = weight.lower()

    def called(trailing, **settings):
        reference = Followed(answers(f["model_output_ref"]), answers(f[f"model_output_{trailing}"]))
        method = AWM(order=order, clip=clip, kl_weight=kind, ema_kl_weight=kind, time=times, **settings)
        return method(answers(v), reference, batch, Draws(noise))

    held = called("ema", kl=0.003, ema_kl=1.0)
    total = held.loss
    if policy == "off":
        off = called("old", kl=0, ema_kl=0, old="trailing")
        total = total - called("ema", kl=0, ema_kl=0).loss + off.loss
        assert off.loss.item() == pytest.approx(f[prefix + "policy_loss"].item(), abs=1e-10)
    else:
        assert held.metrics["policy_loss"].item() == pytest.approx(
            f[prefix + "policy_loss"].item(), abs=1e-10
        )
    assert total.item() == pytest.approx(f[prefix + "loss"].item(), abs=1e-10)
    assert held.metrics["kl"].item() == pytest.approx(f[prefix + "kl"].item(), abs=1e-10)
    assert held.metrics["ema_kl"].item() == pytest.approx(f[prefix + "emakl"].item(), abs=1e-10)
    total.backward()
    torch.testing.assert_close(v.grad, torch.from_numpy(f[prefix + "grad"]), atol=1e-10, rtol=1e-9)


def test_awms_stand_ins_and_noising_against_the_reference_implementation():
    f = np.load(AWM_GOLDEN)
    t = torch.from_numpy(f["timesteps"]).flatten()
    x0, eps = (torch.from_numpy(f[name]) for name in ("clean_latents", "noise"))
    noised = add_noise(answers(eps), x0, eps, t)
    torch.testing.assert_close(noised, torch.from_numpy(f["noised_latents"]), atol=1e-12, rtol=0)
    error = ((torch.from_numpy(f["model_output"]) - (eps - x0)) ** 2).flatten(1).mean(1)
    for theirs, name in (
        ("Uniform", "uniform"),
        ("t", "t"),
        ("t**2", "t2"),
        ("huber", "huber"),
        ("ghuber",) * 2,
    ):
        if f"logp_{theirs}" in f:
            torch.testing.assert_close(
                surrogate_log_density(error, t, name),
                torch.from_numpy(f[f"logp_{theirs}"]),
                atol=1e-10,
                rtol=0,
            )
    std = torch.from_numpy(f["std_dev_t"]).flatten()
    torch.testing.assert_close(elbo_weight(t), 1 / (2 * std**2))


@pytest.mark.parametrize("kind", ["discrete", "discrete_wo_init"])
def test_stratified_steps_against_the_reference_implementation(kind):
    f = np.load(AWM_GOLDEN)
    if f"{kind}_t_indices" not in f:
        pytest.skip(f"among the shipped vectors there is no {kind}")
    grid = torch.cat([torch.from_numpy(f["sched_timesteps"]) / 1000, torch.zeros(1)])
    t = Stratified(kind)(3, Draws(None, torch.from_numpy(f[f"{kind}_rand_u"])), grid)
    expected = torch.from_numpy(f[f"{kind}_timesteps"]).reshape(6, 3).T.double()
    torch.testing.assert_close(t, expected, atol=1e-7, rtol=0)


def test_stratified_times_by_hand():
    u = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    grid = torch.linspace(1, 0, 11, dtype=torch.float64)
    last = 1 - torch.arange(10, dtype=torch.float64) / 10
    every = Stratified("discrete", None, 0.99)(3, Draws(None, torch.full((9,), 0.7)), grid)
    torch.testing.assert_close(every, last[:9].expand(3, -1))
    steps = Stratified("discrete_wo_init", 3)(1, Draws(None, u), grid)  # 1 .. 8 in parts of 2, 3 and 3
    torch.testing.assert_close(steps[0], last[torch.tensor([1, 4, 8])])
    low, shift = 0.2, 3.0
    flat = [low + 0.8 * (i + float(u[i])) / 3 for i in range(3)]
    expected = [shift * t / (1 + 2 * t) for t in flat]
    assert Stratified("uniform", 3)(1, Draws(None, u), None)[0].tolist() == pytest.approx(expected)
    middle = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)  # quantiles 1/6, 1/2 and 5/6
    quantile = 0.9674215661017014
    expected = [shift * t / (1 + 2 * t) for t in (1 / (1 + math.exp(-q)) for q in (-quantile, 0, quantile))]
    assert Stratified("logit_normal", 3)(1, Draws(None, middle), None)[0].tolist() == pytest.approx(expected)
    zero = torch.zeros(3, dtype=torch.float64)
    assert Stratified("logit_normal", 3)(1, Draws(None, zero), None)[0, 0].item() == 0.01
    with pytest.raises(UserError, match="strata=6 over the steps 1 to 3 of the sampler"):
        Stratified()(1, Draws(None, u), torch.linspace(1, 0, 6))
    with pytest.raises(UserError, match="without sampling times; allowed: logit_normal, uniform"):
        Stratified()(1, Draws(None, u), None)


def test_every_row_has_its_own_noise_or_rivals_share_it():
    class Echo:
        path, target = FLOW, "flow"

        def __call__(self, x_t, t, cond):
            return x_t + cond["label"].reshape(-1, 1)

    group = torch.tensor([0, 1, 0, 1])
    batch = Batch(normal(4, 2), {"label": torch.arange(4.0)}, group, torch.zeros(4))
    for shared in (False, True):
        rows = noised_rows(Stratified("uniform", 3), Echo(), batch, Streams([1, 2]), shared)
        assert torch.equal(rows.cond["label"], torch.arange(4.0).repeat(3)) and rows.strata == 3
        t, eps = rows.by_time(rows.z.t), rows.by_time(rows.z.eps)
        assert torch.equal(t[:, 0], t[:, 2]) and torch.equal(t[:, 1], t[:, 3]) and (t[:-1] < t[1:]).all()
        assert len(eps.flatten(0, 1).unique(dim=0)) == (6 if shared else 12)
        assert bool((eps[:, 0] == eps[:, 2]).all()) == shared
        other = noised_rows(
            Stratified("uniform", 3), Echo(), batch.select(torch.tensor([1])), Streams([2]), True
        )
        if shared:  # a group's draws are those of its stream, whatever its batch
            torch.testing.assert_close(other.z.eps[:, 0], eps[:, 1, 0], check_dtype=False)


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("mode", ["all", "positive_only", "negative_only", "one_only", "binary"])
def test_diffusion_nft_by_numpy(beta, mode):
    x0, noise, x_t, _, t, v, base, old, ask, reference = played()
    advantage = torch.tensor([1.0, -0.5, 9.0], dtype=torch.float64)
    method = DiffusionNFT(beta, mode=mode, kl=0.3, time=Times(T))
    step = method(ask(v), reference, sampled(x0, advantage), Draws(noise))
    kept = {"all": [1.0, -0.5, 5.0], "positive_only": [1.0, 0, 5.0], "negative_only": [0, -0.5, 0],
            "one_only": [1.0, 0, 1.0], "binary": [1.0, -1.0, 1.0]}[mode]  # fmt: skip
    total, kl = [], []
    for row in range(S * B):
        i, time = row % B, t[row].item()
        now, before = v[row].detach().numpy(), old[row].numpy()
        r = min(max(kept[i] / 5 / 2 + 0.5, 0), 1)
        terms = []
        for push in (beta * now + (1 - beta) * before, (1 + beta) * before - beta * now):
            off = x_t[row].numpy() - time * push - x0[i].numpy()
            terms.append((off**2 / max(np.abs(off).mean(), 1e-5)).mean())
        total.append((r * terms[0] + (1 - r) * terms[1]) / beta)
        kl.append(((now - base[row].numpy()) ** 2).mean())
    assert step.loss.item() == pytest.approx(5 * np.mean(total) + 0.3 * np.mean(kl), rel=1e-9)
    assert step.metrics["kl"].item() == pytest.approx(np.mean(kl)) and step.weight == B


def test_diffusion_nft_where_policy_and_old_are_one():
    """Then v+ = v- = v: r only says which way the gradient points, 2 r - 1 times that of L, whatever b is."""
    x0, noise, _, _, _t, v, base, _, ask, _ = played()
    grads = []
    for beta in (1.0, 0.1):
        old = Followed(ask(base), ask(v.detach()))
        found = []
        for advantage in (5.0, 0.0, -2.5):
            v.grad = None
            batch = sampled(x0, torch.full((B,), advantage))
            DiffusionNFT(beta, kl=0, time=Times(T))(ask(v), old, batch, Draws(noise)).loss.backward()
            found.append(v.grad.clone())
        torch.testing.assert_close(found[2], -0.5 * found[0], atol=1e-12, rtol=1e-9)
        assert found[1].abs().max() < 1e-12
        grads.append(found[0])
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("reference", ["trailing", "base"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_dgpo_by_numpy(reference, clip):
    """Two groups, of two and one, at two times."""
    x0, noise, _x_t, _target, _, _, _, _, _, _ = played()
    group, share = torch.tensor([0, 1, 0]), noise[[0, 1]]
    said = [normal(S * B, 2, 4, 4, seed=30 + i) * 0.2 for i in range(3)]
    v = said[0].clone().requires_grad_(True)
    advantage = torch.tensor([1.0, 0.3, -6.0], dtype=torch.float64)
    method = DGPO(3.0, reference, clip, kl=0.3, time=Times(T[:2]))
    step = method(
        answers(v), Followed(answers(said[1]), answers(said[2])), sampled(x0, advantage, group), Draws(share)
    )
    step.loss.backward()

    eps = torch.stack([share[group[i], time, 0] for time in range(S) for i in range(B)])
    goal = (eps - x0.repeat(S, 1, 1, 1)).numpy()
    m, base, ema = (((p.detach().numpy() - goal) ** 2).mean((1, 2, 3)).reshape(S, B) for p in (v, *said[1:]))
    r, a = (ema if reference == "trailing" else base), np.array([1.0, 0.3, -5.0])
    weight = np.empty((S, B))
    for time in range(S):
        for members in ([0, 2], [1]):
            inside = sum(3.0 * a[i] * (m[time, i] - r[time, i]) for i in members) / len(members)
            weight[time, members] = 1 / (1 + np.exp(-inside))
    kl = ((said[0] - said[1]) ** 2).mean().item()
    assert step.loss.item() == pytest.approx((weight * a * m).mean() + 0.3 * kl, rel=1e-9)
    free = np.ones((S, B))
    if clip is not None:
        ratio = np.exp(ema - m)
        free = 1.0 - np.where(a > 0, ratio > 1 + clip, ratio < 1 - clip)
        assert 0 < free.sum() < free.size
    d = v[0].numel()
    pull = (free * weight * a).reshape(-1, 1, 1, 1) * 2 * (said[0].numpy() - goal) / d / (S * B)
    pull = pull + 0.3 * 2 * (said[0] - said[1]).numpy() / d / (S * B)
    np.testing.assert_allclose(v.grad.numpy(), pull, atol=1e-12, rtol=1e-9)


def test_how_fast_a_policy_is_followed():
    awm, nft = Trail(), Trail(0.999, 0.0075, 75)
    assert [1 - awm.mix(step) for step in (0, 1, 100, 300, 5000)] == pytest.approx([0, 0.001, 0.1, 0.3, 0.3])
    assert [1 - nft.mix(step) for step in (0, 75, 76, 175, 1000)] == pytest.approx(
        [0, 0, 0.0075, 0.75, 0.999]
    )


def test_what_the_matching_methods_refuse():
    x0, noise, _, _, _, v, _, _, ask, reference = played()
    for method in (AWM(time=Times(T)), DiffusionNFT(time=Times(T)), DGPO(time=Times(T))):
        with pytest.raises(UserError, match="needs a moving average of the policy"):
            method(ask(v), ask(v.detach()), sampled(x0, torch.ones(B)), Draws(noise))
        with pytest.raises(UserError, match="advantages, and this batch has none"):
            method(ask(v), reference, Batch(x0, {}, torch.arange(B), torch.ones(B)), Draws(noise))
    for bad in (
        {"type": "awm", "clip": 1.5},
        {"type": "awm", "weighting": "snr"},
        {"type": "awm", "time": {"strata": 0}},
        {"type": "diffusion_nft", "beta": 0},
        {"type": "diffusion_nft", "trail": {"limit": 1}},
        {"type": "dgpo", "clip": 1},
        {"type": "dgpo", "advantage_clip": 0},
    ):
        with pytest.raises(UserError, match=next(key for key in bad if key != "type")):
            build(bad)
    made = build({"type": "diffusion_nft", "trail": {"every": 2}})
    assert made.trail == Trail(0.5, every=2) and build({"type": "awm", "ema_kl": 0}).trails is False
