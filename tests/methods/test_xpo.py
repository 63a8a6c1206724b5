"""XPO: TRL's numbers on log-probabilities, whose samples are whose in a round, and what the floor holds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from diffalign.losses.pairwise import IPO, Logistic
from diffalign.methods import build
from diffalign.methods.dpo import DPO
from diffalign.methods.xpo import XPO
from diffalign.rollout.setting import Setting
from diffalign.rollout.shapes import Request, samples
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from tests.helpers import VECTORS
from tests.methods.test_recent_methods import SHIFT, on_likelihoods
from tests.rollout.test_shapes import GRID, PROMPTS, SHAPE, Counting, conditions


def cases():
    """(file, prefix of the inputs, what they are called) of all cases."""
    f = np.load(VECTORS / "xpo_a.npz")
    found = [
        ("xpo_a", key.removesuffix("logp_model_on_model"))
        for key in f
        if key.endswith("_logp_model_on_model")
    ]
    return [*found, ("llm_objectives", "xpo_")]


@pytest.mark.parametrize(("file", "prefix"), cases())
def test_golden_xpo(file, prefix):
    """Tokens add up to a sample's log-probability; rows are the policy's samples, then the reference's.

    The stand-in network's errors are those of log-probabilities below 9: the bonus differs by alpha 9.
    """
    f = np.load(VECTORS / f"{file}.npz")
    word = "" if file == "llm_objectives" else "logp_"
    if f"{prefix}{word}model_on_model" not in f:
        pytest.skip(f"among the shipped vectors there is no {prefix} of {file}")
    tokens = {
        name: torch.from_numpy(f[f"{prefix}{word}{name}"]).requires_grad_(name.startswith("model"))
        for name in ("model_on_model", "model_on_ref", "ref_on_model", "ref_on_ref")
    }
    total = {name: value.sum(1) for name, value in tokens.items()}
    policy = torch.cat([total["model_on_model"], total["model_on_ref"]])
    reference = torch.cat([total["ref_on_model"], total["ref_on_ref"]])
    count = len(policy) // 2
    won = torch.from_numpy(f[f"{prefix}chosen_is_model"]).double()
    beta, alpha = float(f[f"{prefix}beta"]), float(f[f"{prefix}alpha"])
    ipo = f"{prefix}loss_type" in f and str(f[f"{prefix}loss_type"]) == "ipo"
    # TRL's IPO looks at log-ratios without beta, which is its target's alone
    method = XPO(scale=1, beta=1 if ipo else beta, alpha=alpha, loss=IPO(beta) if ipo else Logistic())
    theirs = torch.cat([torch.zeros(count), torch.ones(count)])
    step = on_likelihoods(
        method, policy, reference, torch.cat([won, 1 - won]), extra={"of_reference": theirs}
    )
    step.loss.backward()
    assert step.loss.item() == pytest.approx(float(f[f"{prefix}loss"]) - alpha * SHIFT, abs=1e-9)
    dpo = f[f"{prefix}dpo_losses" if file == "llm_objectives" else f"{prefix}dpo"]
    assert step.metrics["preference_loss"].item() == pytest.approx(dpo.mean(), abs=1e-9)
    assert step.metrics["bonus"].item() == pytest.approx(f[f"{prefix}bonus"].mean() - alpha * SHIFT, abs=1e-9)
    names = (
        ("grad_model", "grad_ref")
        if file == "llm_objectives"
        else ("grad_model_on_model", "grad_model_on_ref")
    )
    for name, own in zip(names, ("model_on_model", "model_on_ref"), strict=True):
        np.testing.assert_allclose(tokens[own].grad.numpy(), f[f"{prefix}{name}"], atol=1e-9)


def pair(policy, floor=None, alpha=0.1, score=(1.0, 0.0)):
    leaf = torch.tensor(policy).double().requires_grad_()
    step = on_likelihoods(
        XPO(scale=2.0, beta=0.5, alpha=alpha, floor=floor), leaf, torch.zeros(2).double(),
        torch.tensor(score), torch.zeros(2).long(), {"of_reference": torch.tensor([0.0, 1.0])},
    )  # fmt: skip
    step.loss.backward()
    return step, leaf.grad


def test_the_bonus_pushes_the_references_sample_and_the_floor_stops_it():
    plain, without = pair((0.3, -0.4), alpha=0.0)
    step, grad = pair((0.3, -0.4))
    assert step.loss.item() == pytest.approx(plain.loss.item() + 0.1 * 2 * (-0.4 - SHIFT))
    assert (grad - without).tolist() == pytest.approx([0, 0.2])
    assert pair((0.3, -0.4), floor=1.0)[1].tolist() == pytest.approx(grad.tolist())
    assert pair((0.3, -0.4), floor=0.7)[1].tolist() == pytest.approx(without.tolist())
    tied, flat = pair((0.3, -0.4), score=(0.5, 0.5))
    assert tied.weight == 0 and flat.abs().max() == 0


def test_without_a_bonus_it_is_dpo():
    g = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=g).double()
    theirs = torch.tensor([0.0, 0, 0, 1, 1, 1])
    one = on_likelihoods(XPO(scale=20, beta=0.1, alpha=0), policy, reference, extra={"of_reference": theirs})
    other = on_likelihoods(DPO(beta=2), policy, reference)
    assert one.loss.item() == pytest.approx(other.loss.item())
    assert one.metrics["rewards/margins"].item() == pytest.approx(other.metrics["rewards/margins"].item())


@pytest.mark.parametrize("shared", [True, False])
def test_the_last_sample_of_each_prompt_is_the_references(shared):
    """The policy alone and the reference alone, from the same noise."""
    policy, reference = Counting(0.0), Counting(0.3)
    cond, negative = conditions()
    setting = Setting(DDIM(), GRID, samples=3, shared_noise=shared, by_reference=True)
    found = samples(Request(policy, reference, cond, negative, setting), SHAPE, Streams(range(PROMPTS)))
    for row, who in ((slice(0, 2), policy), (slice(2, 3), reference)):
        alone = Request(who, None, cond, negative, replace(setting, by_reference=False))
        expected = samples(alone, SHAPE, Streams(range(PROMPTS)))
        torch.testing.assert_close(found.x[:, :, row], expected.x[:, :, row])
    assert (found.x[:, :, 0] - found.x[:, :, 2]).abs().max() > 1e-3


def test_what_is_refused():
    with pytest.raises(UserError, match="does not mark them"):
        on_likelihoods(XPO(), torch.zeros(2).double(), torch.zeros(2).double())
    run = read_run("tiny_sdxl_dpo")
    with pytest.raises(UserError, match=r"xpo learns from rollouts, but rollout\.prompts is empty"):
        check_online(replace(run, method={"type": "xpo"}))
    for values, word in (({"alpha": -1}, "alpha=-1"), ({"floor": 0}, "floor=0"), ({"scale": 0}, "scale=0")):
        with pytest.raises(UserError, match=word):
            build({"type": "xpo", **values})
