"""CRD: Flow-Factory's numbers, the formula in numpy with prompts of two sizes, its kept references."""

import re

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.losses.surrogates import group_softmax
from diffalign.methods import build
from diffalign.methods._trailing import Followed, TrailingSampler
from diffalign.methods.crd import CRD
from tests.helpers import VECTORS
from tests.methods.test_flow_methods import Draws, S, T, Times, answers, played, sampled

FILE = VECTORS / "crd_a.npz"


def cases():
    return sorted({key.removesuffix("_v_target") for key in np.load(FILE) if key.endswith("_v_target")})


@pytest.mark.parametrize("case", cases())
def test_golden_crd(case):
    f = {key.removeprefix(f"{case}_"): value for key, value in np.load(FILE).items() if key.startswith(case)}
    target = torch.from_numpy(f["v_target"])
    count = len(target)
    temperature = float(f["weight_temp"])
    method = CRD(
        beta=float(f["beta"]),
        advantage_clip=float(f["adv_clip"]),
        loss_type=str(f["loss_type"]),
        weight_temp=temperature if temperature > 0 else None,
        kl=0,
        time=Times(((0.5,),)),
    )
    v = torch.from_numpy(f["v"]).requires_grad_()
    # of x0 = 0 the velocity is the noise; all samples are of one prompt, which is the port's micro-batch
    batch = sampled(torch.zeros_like(target), torch.from_numpy(f["advantage"]), torch.zeros(count).long())
    reference = Followed(answers(f["v"]), answers(f["v_old"]))
    step = method(answers(v), reference, batch, Draws(target[None, None]))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    assert step.metrics["implicit"].item() == pytest.approx(f["r_theta"].mean(), abs=1e-10)
    assert step.metrics["reward"].item() == pytest.approx(f["r01"].mean(), abs=1e-10)
    np.testing.assert_allclose(v.grad.numpy(), f["grad_v"], atol=1e-10)


def test_golden_decay_of_both_averages():
    f = np.load(VECTORS / "crd_decay_a.npz")
    method = CRD()
    assert isinstance(method, TrailingSampler)
    names = {key.partition("_")[0] for key in f if key != "steps"}
    assert names == {"old", "sampling"}
    for key in f:
        if key == "steps":
            continue
        trail = method.trail if key.startswith("old") else method.sampler_trail
        decay = [1 - trail.mix(int(step)) for step in f["steps"]]
        np.testing.assert_allclose(decay, f[key], atol=1e-12)


@pytest.mark.parametrize("loss_type", ["mse", "bce"])
@pytest.mark.parametrize("temperature", [None, 0.4])
def test_crd_by_numpy(loss_type, temperature):
    """Two prompts, of two samples and one, at two times; the base is guided."""
    x0, _, _, _, _, _, _, _, _, _ = played()
    said = [
        0.3 * torch.randn(S * 3, 2, 4, 4, generator=torch.Generator().manual_seed(i)).double()
        for i in range(3)
    ]
    noise = torch.randn(2, S, 2, 2, 4, 4, generator=torch.Generator().manual_seed(9)).double()
    group, advantage = torch.tensor([0, 1, 0]), torch.tensor([1.0, 0.3, -6.0]).double()
    v = said[0].clone().requires_grad_()
    method = CRD(
        beta=0.7, loss_type=loss_type, weight_temp=temperature, kl=0.2, kl_floor=0.05, kl_guidance=1.0,
        time=Times(T[:2]),
    )  # fmt: skip
    step = method(
        answers(v), Followed(answers(said[1]), answers(said[2])), sampled(x0, advantage, group), Draws(noise)
    )
    step.loss.backward()

    rank = [0, 0, 1]
    reward = np.clip(advantage.numpy(), -5, 5) / 10 + 0.5
    fits, kls = [], []
    for time in range(S):
        implicit = []
        for i in range(3):
            row = time * 3 + i
            target = (noise[group[i], time, rank[i]] - x0[i]).numpy()
            scaled = []
            for who in (said[2], said[0]):
                off = who[row].numpy() - target
                scaled.append((off**2).mean() / max(np.abs(off).mean(), 1e-5))
            implicit.append(scaled[0] - scaled[1])
            distance = ((said[0][row] - said[1][row]).numpy() ** 2).mean()
            kls.append((0.25 + 0.75 * reward[i]) * distance)
        for members in ([0, 2], [1]):
            r, t = reward[members], np.array(implicit)[members]
            pools = [np.zeros_like(r)] if temperature is None else [r / temperature, -r / temperature]
            terms = []
            for pool in pools:
                q = np.exp(pool) / np.exp(pool).sum()
                logit, goal = 0.7 * (t - (q * t).sum()), r - (q * r).sum()
                if loss_type == "mse":
                    terms.append((logit - goal) ** 2)
                else:
                    p = 1 / (1 + np.exp(-goal))
                    terms.append(np.log1p(np.exp(logit)) - p * logit)
            fits += list(np.mean(terms, 0))
    assert step.loss.item() == pytest.approx(5 / 0.7 * np.mean(fits) + 0.2 * np.mean(kls), rel=1e-9)
    assert v.grad.abs().max() > 0 and step.weight == 3


def test_at_the_start_the_gradient_is_not_zero_and_follows_the_reward():
    """v = v_old: the implicit rewards are 0, and a step raises that of the better sample."""
    x0 = torch.zeros(2, 2, 4, 4).double()
    noise = torch.randn(1, 1, 2, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    start = 0.2 * torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    v = start.clone().requires_grad_()
    batch = sampled(x0, torch.tensor([2.0, -2.0]).double(), torch.zeros(2).long())
    method = CRD(kl=0, time=Times(((0.5,),)))
    step = method(answers(v), Followed(answers(start), answers(start)), batch, Draws(noise))
    step.loss.backward()
    moved = (start - 0.1 * v.grad).detach()
    error = lambda p: ((p - noise[0, 0]) ** 2).flatten(1).mean(1)  # noqa: E731
    change = error(moved) - error(start)
    assert change[0] < 0 < change[1]


def test_a_softmax_within_groups():
    values = torch.tensor([[1.0, 500.0, 2.0], [0.0, -500.0, 0.0]])
    found = group_softmax(values, torch.tensor([0, 1, 0]))
    e = np.exp(-1)
    np.testing.assert_allclose(found.numpy(), [[e / (1 + e), 1, 1 / (1 + e)], [0.5, 1, 0.5]], rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "word"),
    [({"beta": 0}, "beta=0"), ({"weight_temp": 0}, "weight_temp=0"), ({"kl_floor": 1}, "kl_floor=1"),
     ({"advantage_clip": 0}, "advantage_clip=0"), ({"loss_type": "mae"}, "loss_type")],
)  # fmt: skip
def test_what_it_refuses(values, word):
    with pytest.raises(UserError, match=re.escape(word)):
        build({"type": "crd", **values})
