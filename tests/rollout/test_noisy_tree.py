"""LPO's rollout: a tree whose noisy candidates are judged as they are, by a latent reward model."""

import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from diffalign import tiny
from diffalign.config.schema import RolloutConfig
from diffalign.diffusion.randomness import Streams
from diffalign.diffusion.samplers import DDIM
from diffalign.errors import UserError
from diffalign.rewards.zoo.latent_reward import NoisyReward
from diffalign.rollout.judges import judge_of
from diffalign.rollout.setting import Setting
from diffalign.rollout.shapes import Request
from diffalign.rollout.tree import tree
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.utils.text import read_json_lines
from tests.rollout.test_shapes import GRID, PROMPTS, SHAPE, Counting, conditions
from tests.runs.test_rollouts import silent, small


@dataclass(frozen=True)
class SumsUp:
    """A reward that is the time plus the sum of latents."""

    def __call__(self, images, prompts):
        raise AssertionError("nobody asks for an image")

    def of_latents(self, latents, prompts, t):
        return t + latents.flatten(1).sum(1)


@pytest.mark.parametrize("inner", [0, 2])
def test_candidates_are_judged_as_they_are_with_the_time_that_they_were_drawn_from(inner):
    cond, negative = conditions()
    setting = Setting(DDIM(1.0), GRID, 5.0, 4, inner_steps=inner, estimate="none")
    found, parents = (
        tree(Request(policy, None, cond, negative, replace(setting, estimate=how)), SHAPE, Streams([7, 8, 9]))
        for policy, how in ((Counting(), "none"), (Counting(), "parent"))
    )
    # the tree itself is the one of any other estimate
    for ours, theirs in zip(found.x, parents.x, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(found.verdict, parents.verdict)
    # a verdict is on the last step of its segment
    last = [int((found.verdict == number).nonzero().max()) for number in range(found.judged.shape[1])]
    assert torch.equal(found.judged, found.x.x_s[:, last])
    torch.testing.assert_close(found.at, found.x.t[0, last, 0].to(found.at))


def test_only_the_candidate_that_is_continued_is_asked_about():
    cond, negative = conditions()
    policy = Counting()
    tree(Request(policy, None, cond, negative, Setting(DDIM(1.0), GRID, 5.0, 4, estimate="none")), SHAPE,
         Streams([7, 8, 9]))  # fmt: skip
    assert policy.asked == 2 * PROMPTS * 20


def test_the_judge_shows_latents_and_time():
    config = RolloutConfig(rewards=("2*latent_reward:here",), estimate="none")
    judge = judge_of(config, "cpu", lambda spec, device: SumsUp())
    latents, t = torch.randn(3, 4, 2, 2), torch.tensor([0.9, 0.5, 0.1])
    found = judge.submit(latents, ["a", "b", "c"], t).result()
    torch.testing.assert_close(found, (t + latents.sum((1, 2, 3)))[:, None])
    assert judge.weights == (2.0,)


def test_who_judges_images_is_refused():
    with pytest.raises(UserError, match="'taste' judges images; allowed: latent_reward"):
        judge_of(RolloutConfig(rewards=("taste",), estimate="none"), "cpu")


@pytest.mark.parametrize("change", [{"scoring": "process"}, {"shape": "trajectories"}, {"decoder": "taesd"}])
def test_what_needs_images_is_refused(change, tmp_path):
    with pytest.raises(UserError, match=r"rollout.estimate='none'.*allowed with it: rollout.shape tree"):
        check_online(small(tmp_path / "run", "spo", estimate="none", **change))


def test_spo_learns_from_a_latent_reward_model(tmp_path):
    """A random one of the published layout over the tiny SDXL itself, as its training starts."""
    base, model = tiny.pipeline_path("sdxl"), tmp_path / "lrm"
    for part in ("unet", "text_encoder", "text_encoder_2"):
        shutil.copytree(base / part, model / part)
    run = small(tmp_path / "run", "spo", steps=2, estimate="none", rewards=(f"latent_reward:{model}@{base}",))
    torch.save(heads_for(model), model / "state_dict.pt")
    result = align(run, silent)
    assert (result.steps, result.interrupted) == (2, False)
    rows = [row for row in read_json_lines(result.output / "metrics.jsonl") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    told = read_json_lines(result.output / "rollouts" / "round-000000" / "scores.jsonl")
    scores = torch.tensor([row["latent_reward"] for row in told])
    assert scores.isfinite().all() and scores.std() > 0


def heads_for(model):
    """Random projections that fit."""
    import json

    channels = json.loads((model / "unet" / "config.json").read_text())["block_out_channels"]
    width = json.loads((model / "text_encoder_2" / "config.json").read_text())["projection_dim"]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width, sum(channels) + channels[-1], generator=generator)
    return {"visual_projection": {"weight": weight}, "logit_scale": 3.0}


def test_only_who_has_of_latents_is_a_noisy_reward():
    assert isinstance(SumsUp(), NoisyReward) and not isinstance(lambda images, prompts: 0, NoisyReward)
