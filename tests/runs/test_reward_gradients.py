"""Whole runs that differentiate a reward, on the tiny SDXL: the reward rises, they resume exactly, bad
settings.
"""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from diffalign.config.io import apply_overrides
from diffalign.errors import UserError
from diffalign.runs.align import align
from diffalign.runs.online_checks import check_online
from diffalign.runs.validate import read_run
from tests.runs.halves import silent, whole_as_halves


def small(output, *flags):
    run = read_run("tiny_sdxl_draft", [f"--output={output}", "--validation.every=0", "--rollout.steps=4"])
    flags = (
        "--training.batch_size=4",
        "--training.steps=4",
        "--checkpoint.every=2",
        "--method.last=2",
        *flags,
    )
    return apply_overrides(run, [part for flag in flags for part in [flag]])


def test_two_runs_of_two_steps_are_one_of_four(tmp_path):
    whole, one = whole_as_halves(tmp_path, small)
    assert "mean rewards of the samples" in whole.verdict
    assert any(bool(value.abs().sum() > 0) for name, value in one.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("adjoint_dpm", ["--method.solver=heun"]),
        ("adjoint_matching", ["--rollout.eta=1", "--training.max_grad_norm=0"]),
        ("srpo", ["--method.positive=[large]", "--method.negative=[small]", "--method.margin=9"]),
    ],
)
def test_methods_that_go_back_by_themselves_train_adapters(tmp_path, method, flags):
    """Under gradient checkpointing, and with the reference in the same network."""
    run = small(tmp_path, "--training.steps=1", "--training.batch_size=2", "--checkpoint.every=1")
    run = replace(run, method={"type": method}, model=replace(run.model, gradient_checkpointing=True))
    align(apply_overrides(run, ["--rollout.steps=3", *flags]), silent)
    after = load_file(tmp_path / "checkpoints" / "step-1" / "trainable.safetensors")
    moved = [name for name, value in after.items() if "lora_B" in name and bool(value.abs().sum() > 0)]
    assert len(moved) == sum("lora_B" in name for name in after) > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rollout.rewards=judge"], "'judge', which has no gradient"),
        (["--rollout.eta=1"], "rollout.eta=1"),
        (["--rollout.combine=wins"], "rollout.combine='wins'"),
        (["--rollout.by=people"], "rollout.by='people'"),
        (["--strategies=sdpo"], "strategies"),
        (["--rollout.shape=samples"], "rollout.shape='samples' with method draft, which samples itself"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        check_online(small(tmp_path, *flags))


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        # PickScore is usually 17 to 24. The margin of ReFL is 2; with k from 0.1 on, S = k r is 0.7 at r = 7.
        ({"type": "refl"}, ["--rollout.rewards=pickscore"], "17 to 24, and method refl .* a reward of 2 on"),
        (
            {"type": "srpo"},
            ["--rollout.rewards=pickscore"],
            "17 to 24, and method srpo .* a reward of 7 on .* first branch",
        ),
        (
            {"type": "srpo", "positive": [], "negative": []},
            ["--rollout.rewards=pickscore"],
            "reward of 0.7 on",
        ),
        ({"type": "refl"}, ["--rollout.rewards=0.05*pickscore"], None),
        ({"type": "srpo"}, ["--rollout.rewards=0.05*pickscore"], None),
        ({"type": "refl"}, ["--rollout.rewards=image_reward"], None),
        ({"type": "draft"}, ["--rollout.rewards=pickscore"], None),
    ],
)
def test_rewards_past_the_margin_have_no_gradient_and_are_refused(tmp_path, method, flags, words):
    run = apply_overrides(replace(small(tmp_path), method=method), flags)
    if words is None:
        check_online(run)
    else:
        with pytest.raises(UserError, match=words):
            check_online(run)
