"""Flow-GRPO, AWM, DiffusionNFT and DGPO by independent arithmetic and against reference implementations."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.guidance import Guided
from diffalign.methods import build
from diffalign.methods.flow_grpo import FlowGRPO
from diffalign.paths import RectifiedFlow
from diffalign.samplers import DDIM, FlowSDE
from diffalign.types import Batch, Transition
from tests.helpers import SHARED, Answers, needs

FLOW = RectifiedFlow()
STEPS = SHARED / "golden" / "flow_grpo_sde_step.npz"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(v, kernel, t, s, advantage, moved=0.0):
    """Steps that a velocity ``v`` has drawn, their densities taken as if by a policy a little off."""
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


@needs(STEPS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("clip", [1e-4, 1e-5])
def test_flow_grpo_against_the_reference_implementation(beta, clip):
    f = np.load(STEPS)
    prefix = f"grpo_b{beta}_c{'0.0001' if clip == 1e-4 else '1e-05'}_"
    if prefix + "loss" not in f:
        pytest.skip(f"this file lacks {prefix}loss")
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
    with pytest.raises(UserError, match="noisy steps of a flow; allowed elsewhere: ddpo"):
        FlowGRPO()(policy, policy, replace(batch, kernel=DDIM(1.0)), g)
    with pytest.raises(UserError, match="advantages, and this batch has none"):
        FlowGRPO()(policy, policy, replace(batch, extra={}), g)
    with pytest.raises(UserError, match="this batch holds finished samples"):
        FlowGRPO()(policy, policy, Batch(v, {}, torch.arange(2), torch.ones(2)), g)
    for bad in ({"kl": -1}, {"clip": 0}, {"advantage_clip": 0}, {"kl_form": "correct"}):
        with pytest.raises(UserError, match=f"method.{next(iter(bad))}"):
            build({"type": "flow_grpo", **bad})
