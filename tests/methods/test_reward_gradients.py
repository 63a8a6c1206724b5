"""DRaFT, ReFL and AlignProp: golden vectors of a toy flow, the whole sampler by autograd, and what they
promise.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.paths import RectifiedFlow
from diffalign.diffusion.randomness import Streams
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.methods.alignprop import AlignProp
from diffalign.methods.draft import DRaFT
from diffalign.methods.refl import ReFL
from diffalign.types import Batch
from tests.helpers import VECTORS

DRAFT = np.load(VECTORS / "draft_k_a.npz")
BASELINES = np.load(VECTORS / "reward_backprop_baselines_a.npz")
REFL = np.load(VECTORS / "refl_a.npz")


@dataclass
class Toy:
    """The toy of the vectors: velocity tanh(x W + b sigma + cond), on a rectified flow."""

    W: torch.Tensor
    b: torch.Tensor
    path: RectifiedFlow = RectifiedFlow()
    target: str = "flow"
    calls: int = 0

    def __call__(self, x, t, cond):
        self.calls += 1
        return torch.tanh(x @ self.W + self.b * t[:, None].to(x) + cond["c"])


def case(vectors, name):
    """(policy, batch) of a case; the reward is minus the mean squared distance to a target."""
    at = lambda key: torch.from_numpy(vectors[f"{name}_{key}"])  # noqa: E731
    policy = Toy(at("W").requires_grad_(), at("b").requires_grad_())
    noise, target = at("x_noise"), at("target")
    batch = Batch(
        noise,
        {"c": at("cond")},
        torch.arange(len(noise)),
        torch.zeros(len(noise)),
        grid=at("sigmas"),
        value=lambda latents, rows: -((latents - target) ** 2).mean(1),
    )
    return policy, batch


def agree(policy, loss, vectors, prefix):
    assert loss.item() == pytest.approx(float(vectors[f"{prefix}_loss"]), abs=1e-10)
    loss.backward()
    for name in ("W", "b"):
        expected = torch.from_numpy(vectors[f"{prefix}_grad_{name}"])
        torch.testing.assert_close(getattr(policy, name).grad, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
@pytest.mark.parametrize("last", [1, 2, 3, None])
def test_draft_k_against_the_released_loop(name, last):
    policy, batch = case(DRAFT, name)
    step = DRaFT(last=last, hold=0)(policy, policy, batch, torch.Generator())
    agree(policy, step.loss, DRAFT, f"{name}_K{last or 0}")


@dataclass
class Given:
    """A Random whose normal draws are given, one call after another."""

    draws: list

    def normal(self, count, shape=()):
        return self.draws.pop(0)

    def uniform(self, count, shape=()):
        return self.draws.pop(0)


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_draft_lv_against_the_baseline(name):
    policy, batch = case(BASELINES, name)
    eps = list(torch.from_numpy(BASELINES[f"{name}_lv_eps"]))
    step = DRaFT(last=1, copies=2, hold=0)(policy, policy, batch, Given(eps))
    agree(policy, step.loss, BASELINES, f"{name}_lv")


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_refl_rewards_one_prediction(name):
    policy, batch = case(BASELINES, name)
    steps = len(batch.grid) - 1
    index = int(BASELINES[f"{name}_refl_idx"])
    draws = torch.full((len(batch.x),), (index + 0.5) / steps)
    step = ReFL(low=0.0, margin=0.0, scale=1.0, hold=0)(policy, policy, batch, Given([draws]))
    agree(policy, step.loss, BASELINES, f"{name}_refl")  # relu(0 - r) is -r: the toy's rewards are negative


@pytest.mark.parametrize("name", ["a1_a", "a2_a"])
def test_refl_loss_and_gradient_by_the_released_lines(name):
    rewards = torch.from_numpy(REFL[f"{name}_rewards"]).requires_grad_()
    policy, batch = case(BASELINES, "a1_a")
    zeros = torch.zeros(6, 4, dtype=torch.float64)
    batch = replace(batch, x=zeros, group=torch.arange(6), score=torch.zeros(6), cond={"c": zeros})
    batch = replace(batch, value=lambda latents, rows: rewards)
    step = ReFL(hold=0)(policy, policy, batch, Streams.at(0, 0, 6))
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(REFL[f"{name}_loss"]), rel=1e-9)
    torch.testing.assert_close(rewards.grad, torch.from_numpy(REFL[f"{name}_grad"]), rtol=1e-9, atol=0)


def test_all_steps_are_the_gradient_of_the_whole_sampler():
    policy, batch = case(DRAFT, "a2_a")
    x = batch.x
    for t, s in zip(batch.grid, batch.grid[1:], strict=False):
        x = x + (s - t) * policy(x, t.expand(len(x)), batch.cond)
    loss = -batch.value(x, torch.arange(len(x))).mean()
    (expected,) = torch.autograd.grad(loss, policy.W)
    DRaFT(last=None, hold=0)(policy, policy, batch, torch.Generator()).loss.backward()
    torch.testing.assert_close(policy.W.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [DRaFT(last=2), ReFL(low=0.3, margin=5.0), AlignProp(centre=0.5)])
def test_the_penalty_is_nothing_at_the_start_and_holds_afterwards(method):
    policy, batch = case(DRAFT, "a2_a")
    same = Toy(policy.W.detach(), policy.b.detach())
    at_start = method(policy, same, batch, Streams.at(0, 0, len(batch.x)))
    free = replace(method, hold=0.0)(policy, same, batch, Streams.at(0, 0, len(batch.x)))
    assert at_start.loss.item() == pytest.approx(free.loss.item(), abs=1e-9)
    assert at_start.metrics["held"] == 0
    other = Toy(policy.W.detach() + 0.1, policy.b.detach())
    held = method(policy, other, batch, Streams.at(0, 0, len(batch.x)))
    assert held.metrics["held"] > 0
    assert held.loss > free.loss
    assert method.needs_reference
    assert not replace(method, hold=0.0).needs_reference


@pytest.mark.parametrize("method", [DRaFT(last=2), ReFL(low=0.3, margin=5.0), AlignProp(centre=0.5)])
def test_a_batch_is_its_samples_one_by_one(method):
    policy, batch = case(DRAFT, "a2_a")
    whole = method(policy, policy, batch, Streams.at(0, 0, len(batch.x)))
    alone = []
    for i in range(len(batch.x)):
        one = replace(batch, x=batch.x[i : i + 1], cond={"c": batch.cond["c"][i : i + 1]})
        one = replace(one, group=torch.zeros(1, dtype=torch.long), score=torch.zeros(1))
        alone.append(method(policy, policy, one, Streams.at(0, i, 1)).loss.item())
    assert whole.loss.item() == pytest.approx(np.mean(alone), rel=1e-5)
    assert whole.weight == len(batch.x)


def test_draft_calls_the_network_once_a_step():
    policy, batch = case(DRAFT, "a1_a")
    reference = Toy(policy.W.detach(), policy.b.detach())
    DRaFT(last=2)(policy, reference, batch, torch.Generator())
    assert (policy.calls, reference.calls) == (len(batch.grid) - 1, 2)


def test_alignprop_draws_the_released_depths():
    method = AlignProp()
    first = method.first_steps(4000, 50, Streams.at(3, 0, 4000))
    assert first.min() >= 1
    assert first.max() <= 49
    # int(Normal(42, 5)) truncated to [1, 50): mean a little below 42
    assert first.float().mean() == pytest.approx(41.2, abs=0.5)
    assert AlignProp(spread=0).first_steps(3, 10, Streams.at(0, 0, 3)).tolist() == [8, 8, 8]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"type": "draft", "last": 0}, "method.last=0"),
        ({"type": "draft", "last": 2, "copies": 1}, "method.copies=1 with method.last=2"),
        ({"type": "draft", "hold": -1}, "method.hold=-1"),
        ({"type": "refl", "low": 1.0}, "method.low=1.0"),
        ({"type": "refl", "scale": 0}, "method.scale=0"),
        ({"type": "alignprop", "centre": 1.0}, "method.centre=1.0"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(UserError, match=words):
        build(values)
