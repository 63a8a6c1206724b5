"""What every method of reward gradients has: a gradient at the start, and by default a guard against
over-optimisation, which pulls back to the reference where the reward says nothing.
"""

from dataclasses import replace

import pytest
import torch

from diffalign.diffusion.randomness import Streams
from diffalign.methods import REGISTRY, build
from diffalign.methods._reward_gradients import Differentiating
from diffalign.methods.registry import DataKind
from tests.methods.test_reward_gradients import DRAFT, Toy, case

NAMES = [name for name, card in REGISTRY.items() if card.data is DataKind.DIFFERENTIABLE]


def loss_of(name, shift, weight):
    """(loss, its gradient to W, the shift of W) of a method with its defaults on a toy flow, the policy being
    ``shift`` away from the reference and the reward ``weight`` times the mean of the latents.
    """
    policy, batch = case(DRAFT, "a2_a")

    def value(latents, rows, words=()):
        reward = weight * latents.mean(1)
        return torch.stack([reward] * len(words)) if words else reward

    reference = Toy(policy.W.detach().clone(), policy.b.detach())
    away = torch.randn(policy.W.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    policy.W = (policy.W.detach() + shift * away).requires_grad_()
    batch = replace(batch, value=value, grid=torch.linspace(1, 0, 9, dtype=torch.float64))
    method = build({"type": name})
    step = method(policy, reference, batch, Streams.at(0, 0, len(batch.x)))
    (gradient,) = torch.autograd.grad(step.loss, policy.W)
    return step.loss.item(), gradient, away


def test_all_are_of_one_kind_and_sample_as_gradients():
    assert {"draft", "refl", "alignprop", "adjoint_dpm", "adjoint_matching", "srpo"} <= set(NAMES)
    for name in NAMES:
        assert isinstance(build({"type": name}), Differentiating)
        assert REGISTRY[name].rollout == "gradients"


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_at_the_start_is_not_zero(name):
    _, gradient, _ = loss_of(name, 0.0, 1.0)
    assert float(gradient.abs().max()) > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_hold_the_policy_at_the_reference(name):
    """With a reward of nothing: no gradient at the reference, the more loss the further away, and a gradient
    that leads back.
    """
    assert build({"type": name}).needs_reference
    at_reference, nothing, _ = loss_of(name, 0.0, 0.0)
    assert float(nothing.abs().max()) < 1e-12
    near, pull, away = loss_of(name, 0.1, 0.0)
    far, more, _ = loss_of(name, 0.2, 0.0)
    assert far > near > at_reference
    assert float((more * away).sum()) > float((pull * away).sum()) > 0


@pytest.mark.parametrize(
    ("name", "margin", "share"), [("refl", 1e9, 0.0), ("refl", -1e9, 1.0), ("srpo", -1e9, 1.0)]
)
def test_the_share_of_samples_past_the_margin_is_a_metric(name, margin, share):
    policy, batch = case(DRAFT, "a2_a")

    def value(latents, rows, words=()):
        return torch.stack([latents.mean(1)] * len(words)) if words else latents.mean(1)

    batch = replace(batch, value=value, grid=torch.linspace(1, 0, 9, dtype=torch.float64))
    step = build({"type": name, "margin": margin, "hold": 0})(
        policy, policy, batch, Streams.at(0, 0, len(batch.x))
    )
    assert step.metrics["past_margin"].item() == share
    (gradient,) = torch.autograd.grad(step.loss, policy.W)
    assert bool(gradient.any()) == (share < 1)
