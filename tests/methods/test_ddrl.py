"""DDRL: cosmos-rl's numbers, the formula by numpy, the data beside what was sampled, and a run with both."""

import itertools
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.noising import add_noise
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import FlowSDE
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.ddrl import DDRL
from diffalign.rollout.beside import WithData
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from diffalign.types import Batch, Transition
from tests.helpers import VECTORS, Answers
from tests.methods.test_flow_methods import FLOW
from tests.methods.test_trust_regions import GivenStep

FILE = VECTORS / "ddrl_a.npz"


def cases():
    return sorted({key.removesuffix("_mu_old") for key in np.load(FILE) if key.endswith("_mu_old")})


@dataclass(frozen=True)
class Given(DDRL):
    """DDRL whose loss on data is a number."""

    given: float = 0.0

    def data_loss(self, policy, batch, generator):
        return torch.tensor(self.given).double()


def steps(mean, old, after, advantage, std=0.5, beside=None):
    rows = len(mean)
    one = torch.ones(rows).double()
    wide = torch.full((rows,) + (1,) * (mean.ndim - 1), std).double()
    return Batch(
        Transition(old, after, 0.6 * one, 0.4 * one, one),
        {},
        torch.arange(rows),
        torch.zeros(rows),
        extra={"advantage": advantage, "drawn_mean": old, "reference_mean": torch.zeros_like(old)},
        kernel=GivenStep(std=wide),
        beside=beside,
    )


@pytest.mark.parametrize("case", cases())
def test_golden_ddrl(case):
    f = {key.removeprefix(f"{case}_"): value for key, value in np.load(FILE).items() if key.startswith(case)}
    get = lambda name: torch.from_numpy(f[name])  # noqa: E731
    mean = get("mu").requires_grad_()
    method = Given(
        clip=float(f["clip"]), data_beta=float(f["data_beta"]), exp_reward=bool(f["exp_reward"]),
        given=float(f["data_loss"]),
    )  # fmt: skip
    batch = steps(mean.detach(), get("mu_old"), get("x_next"), get("advantage"))
    step = method(Answers(mean, FLOW, "flow"), None, batch, torch.Generator())
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-7)
    assert step.metrics["ratio"].item() == pytest.approx(f["ratio"].mean(), abs=1e-10)
    np.testing.assert_allclose(mean.grad.numpy(), f["grad_mu"], atol=1e-10)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


class Linear:
    """A velocity 0.5 x + t, which counts what it is asked."""

    path, target = FLOW, "flow"

    def __init__(self):
        self.weight = torch.tensor(0.5).double().requires_grad_()
        self.asked = []

    def __call__(self, x_t, t, cond):
        self.asked.append((x_t, t, cond))
        return self.weight * x_t + t.reshape(-1, 1, 1, 1)


def real(count=3, seed=5):
    """Return pairs whose second image is the better one; the last pair is a tie."""
    x = drawn(2 * count, 1, 2, 2, seed=seed)
    score = torch.tensor([0.0, 1.0] * count)
    score[-2:] = 0.5
    return Batch(x, {"number": torch.arange(2.0 * count)}, torch.arange(count).repeat_interleave(2), score)


def test_the_loss_on_data_by_numpy():
    """Winners of the pairs, at the times of the steps in turn; the tie counts nothing."""
    policy, data = Linear(), real()
    sampled = steps(*drawn(3, 2, 1, 2, 2), torch.ones(2), beside=data)
    x = sampled.x._replace(t=torch.tensor([0.9, 0.3]).double())
    found = DDRL().data_loss(policy, replace(sampled, x=x), Streams([1, 2]))
    ((x_t, t, cond),) = policy.asked
    assert cond["number"].tolist()[:2] == [1, 3] and t.tolist() == pytest.approx([0.9, 0.3, 0.9])
    x0 = data.x[[1, 3]]
    eps = (x_t[:2] - (1 - t[:2, None, None, None]) * x0) / t[:2, None, None, None]
    noise = Streams([1, 2]).normal(2, (2, 1, 2, 2)).flatten(0, 1)
    torch.testing.assert_close(eps, noise[:2].double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x_t[:2], add_noise(policy, x0, noise[:2].double(), t[:2]))
    off = 0.5 * x_t[:2] + t[:2, None, None, None] - (eps - x0)
    assert found.item() == pytest.approx((off**2).mean().item(), rel=1e-6)


@pytest.mark.parametrize("exp_reward", [False, True])
def test_ddrl_by_numpy(exp_reward):
    mean, old, after = drawn(3, 3, 1, 2, 2)
    advantage = torch.tensor([1.0, -7.0, 0.5]).double()
    method = Given(clip=0.05, data_beta=0.3, exp_reward=exp_reward, kl=0.2, given=2.0)
    batch = steps(mean, old, after, advantage)
    step = method(Answers(mean, FLOW, "flow"), None, batch, torch.Generator())
    a = np.clip(advantage.numpy(), -5, 5)
    a = -np.exp(-a) if exp_reward else a
    squares = lambda m: ((after - m).numpy() ** 2).reshape(3, -1).mean(1)  # noqa: E731
    rho = np.exp(squares(old) - squares(mean))
    policy = np.maximum(-a * rho, -a * np.clip(rho, 0.95, 1.05)).mean()
    kl = ((mean.numpy() ** 2).reshape(3, -1).mean(1) / (2 * 0.25)).mean()
    assert step.loss.item() == pytest.approx(policy + 0.3 * 2.0 + 0.2 * kl, rel=1e-9)
    assert step.metrics["kl"].item() == pytest.approx(kl) and step.weight == 3


def test_at_the_start_both_terms_have_a_gradient():
    policy = Linear()
    x = drawn(2, 1, 2, 2)
    t = torch.tensor([0.8, 0.4]).double()
    kernel_batch = steps(x, x, x, torch.tensor([1.0, -1.0]).double(), beside=real())
    kernel = FlowSDE(0.7)
    mean, std = kernel(policy, x, t, t - 0.1, {})
    after = (mean + std * drawn(2, 1, 2, 2, seed=3)).detach()
    batch = replace(
        kernel_batch, x=Transition(x, after, t, t - 0.1, t), kernel=kernel,
        extra={**kernel_batch.extra, "drawn_mean": mean.detach()},
    )  # fmt: skip
    grads = []
    for beta in (1e-12, 1.0):
        step = DDRL(data_beta=beta)(policy, None, batch, Streams([1, 2]))
        assert step.metrics["ratio"].item() == pytest.approx(1)
        grads.append(torch.autograd.grad(step.loss, policy.weight)[0].item())
    assert abs(grads[0]) > 1e-6 and abs(grads[1] - grads[0]) > 1e-3


def test_two_sources_go_in_step():
    class Counting:
        def __init__(self, offset):
            self.offset, self.at, self.closed = offset, 0, False

        def seek(self, micro_step):
            self.at = micro_step

        def close(self):
            self.closed = True

        def __iter__(self):
            while True:
                value = torch.tensor([float(self.at + self.offset)])
                yield Batch(value, {}, torch.zeros(1).long(), torch.zeros(1))
                self.at += 1

    online = Counting(0)
    source = WithData(online, Counting(100))
    source.seek(3)
    pairs = [(b.x.item(), b.beside.x.item()) for b in itertools.islice(source, 3)]
    assert pairs == [(3, 103), (4, 104), (5, 105)]
    moved = next(iter(source)).to("meta")
    assert moved.x.is_meta and moved.beside.x.is_meta
    source.close()
    assert online.closed


def small(output):
    run = read_run("tiny_sd3_ddrl")
    return replace(
        run,
        output=str(output),
        data=replace(run.data, limit=8, resolution=32),
        rollout=replace(
            run.rollout, prompts_per_round=2, samples=2, steps=3, batch_size=4, rewards=("jpeg",)
        ),
        training=replace(run.training, steps=2, batch_size=2, accumulation=1),
        logging=replace(run.logging, every=1, trackers=()),
        checkpoint=replace(run.checkpoint, every=2, limit=0),
        validation=replace(run.validation, every=0, rewards=()),
    )


def test_a_run_learns_from_its_samples_and_from_a_set(tmp_path):
    told = []
    output = align(small(tmp_path / "run"), told.append).output
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [row["data_loss"] for row in rows if "data_loss" in row]
    assert len(losses) == 2 and min(losses) > 0
    assert any("8 pairs" in line and "beside what is sampled" in line for line in told)


def test_what_is_refused(tmp_path):
    run = small(tmp_path)
    with pytest.raises(UserError, match=r"ddrl learns from real samples .* data\.path is empty"):
        check_online(replace(run, data=replace(run.data, path="")))
    bare = steps(*drawn(3, 2, 1, 2, 2), torch.ones(2))
    with pytest.raises(UserError, match="this batch has none; allowed with it"):
        DDRL()(Answers(drawn(2, 1, 2, 2), FLOW, "flow"), None, bare, torch.Generator())
    for values, word in (({"data_beta": 0}, "data_beta=0"), ({"clip": 0}, "clip=0"), ({"kl": -1}, "kl=-1")):
        with pytest.raises(UserError, match=word):
            build({"type": "ddrl", **values})
