"""GRPO-Guard, Flow-DPPO, TempFlow-GRPO's weights and GDPO: reference implementations and arithmetic."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.likelihood import step_log_density
from diffalign.diffusion.samplers import DDIM, FlowSDE
from diffalign.errors import UserError
from diffalign.losses.policy_gradient import guarded_log_ratio
from diffalign.methods import build
from diffalign.methods.flow_dppo import FlowDPPO
from diffalign.methods.flow_grpo import FlowGRPO, stds
from diffalign.methods.grpo_guard import GRPOGuard
from diffalign.rewards.combine import combine, standardised_in_groups
from diffalign.rollout.advantages import advantages
from diffalign.types import Batch, Transition
from tests.helpers import Answers
from tests.methods.test_flow_methods import FLOW, normal, recorded
from tests.methods.test_lists_and_dynamic_beta import case_of


@dataclass(frozen=True)
class GivenStep(FlowSDE):
    """The noisy step of a flow with a given std, whose mean is what the network says."""

    std: torch.Tensor | None = None

    def __call__(self, denoiser, x_t, t, s, cond):
        return denoiser(x_t, t, cond), self.std


def given(f, method):
    """Run the method on given means of steps: (step, gradient of the loss by the policy's mean)."""
    get = lambda name: torch.from_numpy(f[name])  # noqa: E731
    std = get("std") * get("sqrt_dt")[:, None, None]
    # our densities have log sqrt(2 pi) in float32, the file's in float64
    constant = step_log_density(get("x_next"), get("mu"), std) - get("logp")
    assert constant.abs().max() < 5e-8
    length = get("sqrt_dt") ** 2
    s = torch.full_like(length, 0.25)
    batch = Batch(
        Transition(get("mu_old"), get("x_next"), s + length, s, get("logp_old") + constant),
        {},
        torch.arange(len(std)),
        torch.zeros(len(std)),
        extra={"advantage": get("advantage"), "drawn_mean": get("mu_old")},
        kernel=GivenStep(std=std),
    )
    mean = get("mu").requires_grad_()
    step = method(Answers(mean, FLOW, "flow"), None, batch, torch.Generator())
    step.loss.backward()
    return step, mean.grad.numpy()


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_grpo_guard(case):
    f = case_of("grpo_guard", case)
    settings = {"clip": float(f["clip"]), "advantage_clip": float(f["adv_clip"])}
    step, grad = given(f, GRPOGuard(**settings))
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    assert step.metrics["ratio"].item() == pytest.approx(f["ratio"].mean(), abs=1e-10)
    np.testing.assert_allclose(grad, f["grad_mu"], atol=1e-10)
    even, _ = given(f, GRPOGuard(per_length=False, **settings))
    assert even.loss.item() == pytest.approx(float(f["loss_no_dt_division"]), abs=1e-10)


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_flow_dppo(case):
    f = case_of("flow_dppo", case)
    step, grad = given(f, FlowDPPO(threshold=float(f["kl_threshold"])))
    assert step.loss.item() == pytest.approx(float(f["loss"]), abs=1e-10)
    assert step.metrics["kl_to_drawn"].item() == pytest.approx(f["kl"].mean(), abs=1e-10)
    assert step.metrics["masked_fraction"].item() == pytest.approx(float(f["masked_fraction"]), abs=1e-6)
    np.testing.assert_allclose(grad, f["grad_mu"], atol=1e-10)


def test_the_guarded_ratio_is_the_ratio_of_densities_without_its_bias():
    """S (log p - log p_old + b) by numpy, each step with a std of its own."""
    rng = np.random.default_rng(0)
    mean, old, x = rng.normal(size=(3, 4, 5))
    std = np.array([0.3, 0.7, 1.1, 0.05])[:, None]
    log_p = lambda m: (-((x - m) ** 2) / (2 * std**2)).mean(1)  # noqa: E731
    bias = ((mean - old) ** 2).mean(1) / (2 * std[:, 0] ** 2)
    expected = std[:, 0] * (log_p(mean) - log_p(old) + bias)
    found = guarded_log_ratio(*map(torch.from_numpy, (x, mean, old, std)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def drawn_now(advantage):
    """Return steps that the policy itself has just drawn, with their means."""
    v, t = normal(3, 2, 4, 4), torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    batch = recorded(v, FlowSDE(0.7), t, t - 0.1, torch.tensor(advantage, dtype=torch.float64))
    mean, std = batch.kernel(Answers(v, FLOW, "flow"), batch.x.x_t, t, t - 0.1, {})
    return v.requires_grad_(), std, replace(batch, extra={**batch.extra, "drawn_mean": mean})


def gradient(method, v, batch):
    step = method(Answers(v, FLOW, "flow"), None, batch, torch.Generator())
    return torch.autograd.grad(step.loss, v)[0], step


def test_at_the_start_dppo_is_grpo_without_a_clip_and_guard_is_grpo_times_the_std():
    v, std, batch = drawn_now([1.0, -0.5, 2.0])
    grpo, _ = gradient(FlowGRPO(clip=0.5, kl=None), v, batch)
    dppo, step = gradient(FlowDPPO(), v, batch)
    torch.testing.assert_close(dppo, grpo)
    assert step.metrics["masked_fraction"] == 0 and step.metrics["kl_to_drawn"].item() < 1e-12
    guard, _ = gradient(GRPOGuard(per_length=False), v, batch)
    torch.testing.assert_close(guard, std * grpo)
    each, _ = gradient(GRPOGuard(), v, batch)
    torch.testing.assert_close(each, 10 * std * grpo)
    assert grpo.abs().max() > 0


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_tempflow_weights(case):
    f = case_of("tempflow_weights", case)
    sigmas = torch.from_numpy(f["sigmas"])
    t, s = sigmas[:-1], sigmas[1:]
    batch = Batch(Transition(t[:, None], t[:, None], t, s, t), {}, torch.arange(len(t)), torch.zeros(len(t)))
    found = float(f["scale"]) * stds(FlowSDE(float(f["eta"])), FLOW, batch)
    # a step from pure noise: its denominator takes the grid's first time after 1, which is s
    np.testing.assert_allclose(found.numpy(), f["weights"], atol=1e-10)


def test_noise_weights_multiply_the_gradient_of_each_step():
    v, std, batch = drawn_now([1.0, -0.5, 2.0])
    plain, _ = gradient(FlowGRPO(clip=0.5, kl=None), v, batch)
    weighted, _ = gradient(FlowGRPO(clip=0.5, kl=None, noise_weight=2.25), v, batch)
    torch.testing.assert_close(weighted, 2.25 * std * plain)


@pytest.mark.parametrize("case", ["a1", "a2"])
def test_golden_gdpo(case):
    """The batch normalisation divides by std + 1e-8, the reference by its maximum with 1e-6."""
    f = case_of("gdpo", case)
    rewards = torch.from_numpy(np.stack([f["r1"], f["r2"]], -1)).reshape(3, 4, 2)
    assert (f["group"] == np.repeat(np.arange(3), 4)).all()
    scores = combine(standardised_in_groups(rewards), f["w"].tolist(), "sum")
    found = advantages(scores, ["a", "b", "c"], "batch")
    np.testing.assert_allclose(found.flatten().numpy(), f["adv_gdpo"], atol=1e-7)
    summed = combine(rewards, f["w"].tolist(), "sum")
    kind = "group_batch" if bool(f["global_std"]) else "group_std"
    np.testing.assert_allclose(
        advantages(summed, ["a", "b", "c"], kind).flatten().numpy(), f["adv_sum"], rtol=1e-3
    )


def test_equal_rivals_are_exactly_zero_in_their_group():
    rewards = torch.tensor([[[0.1, 1.0], [0.1, 3.0]], [[5.0, 0.0], [7.0, 0.0]]])
    assert standardised_in_groups(rewards).tolist() == [[[0, -1], [0, 1]], [[-1, 0], [1, 0]]]


def test_what_they_refuse():
    v, _, batch = drawn_now([1.0, -0.5, 2.0])
    policy, g = Answers(v, FLOW, "flow"), torch.Generator()
    for method in (GRPOGuard(), FlowDPPO()):
        with pytest.raises(UserError, match="allowed"):
            method(policy, None, replace(batch, kernel=DDIM(1.0)), g)
        bare = replace(batch, extra={"advantage": batch.extra["advantage"]})
        with pytest.raises(UserError, match="means of steps as they were drawn"):
            method(policy, None, bare, g)
    with pytest.raises(UserError, match=r"rollout\.form sde or dance"):
        GRPOGuard()(policy, None, replace(batch, kernel=FlowSDE(0.7, "cps")), g)
    for section, word in (
        ({"type": "grpo_guard", "clip": 0}, "method.clip=0"),
        ({"type": "flow_dppo", "threshold": 0}, "method.threshold=0"),
        ({"type": "flow_grpo", "noise_weight": 0}, "method.noise_weight=0"),
    ):
        with pytest.raises(UserError, match=word):
            build(section)
