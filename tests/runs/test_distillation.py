"""Whole runs of distillations on the tiny SDXL: they resume exactly, share one base, and refuse what does not
fit.
"""

import pytest
from safetensors.torch import load_file

from diffalign.config.io import apply_overrides
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.runs.align import align
from diffalign.runs.micro_batch import workload_of
from diffalign.runs.online_checks import check_online
from diffalign.runs.role_checks import check_roles
from diffalign.runs.roles import assign_roles
from diffalign.runs.validate import read_run
from tests.runs.halves import silent, whole_as_halves

SMALL = (
    "--validation.every=0",
    "--training.batch_size=2",
    "--training.steps=4",
    "--checkpoint.every=2",
    "--logging.every=1",
)


def small(output, name="distillation_dpo", *flags):
    return apply_overrides(read_run(f"tiny_sdxl_{name}", [f"--output={output}"]), [*SMALL, *flags])


def test_two_runs_of_two_steps_are_one_of_four(tmp_path):
    whole, one = whole_as_halves(tmp_path, small)
    assert "mean rewards of the samples" in whole.verdict
    for adapter in ("default", "better", "worse"):
        assert any(bool(v.abs().sum() > 0) for name, v in one.items() if f"lora_B.{adapter}" in name), adapter
    student = load_file(tmp_path / "whole" / "aligned" / "pytorch_lora_weights.safetensors")
    factors = sum(f".{adapter}." in name for name in one for adapter in ("default",))
    assert factors == sum("alpha" not in name for name in student)


def test_plain_distillation_needs_no_reward(tmp_path):
    result = align(small(tmp_path / "plain", "diff_instruct"), silent)
    assert "without a reward" in result.verdict and result.counts.startswith("8 images sampled")


def test_student_and_assistants_share_one_base(tmp_path):
    run = small(tmp_path)
    model = load(run.model)
    base = sum(p.numel() for p in model.network.parameters())
    roles = assign_roles(run, model, build(run.method), None)
    trained = {name for name, _ in roles.parameters}
    each = [sum(f".{adapter}." in name for name in trained) for adapter in ("default", "better", "worse")]
    assert each[0] > 0 and each == [each[0]] * 3 and len(trained) == sum(each)
    assert workload_of(run).adapter_sets == 3
    whole = sum(p.numel() for p in model.network.parameters())
    assert whole == base + sum(p.numel() for _, p in roles.parameters)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("distillation_dpo", ["--rollout.rewards="], "one or more, which say who wins"),
        ("distillation_dpo", ["--rollout.samples=3"], "rollout.samples=3"),
        ("distillation_dpo", ["--rollout.shared_noise=true"], "rollout.shared_noise=True"),
        ("distillation_dpo", ["--rollout.eta=1"], "rollout.eta=1"),
        ("distillation_dpo", ["--rollout.shape=samples"], "which samples itself"),
        ("diff_instruct", ["--rollout.rewards=judge"], "none: it has no preference"),
        ("diff_instruct", ["--rollout.samples=2"], "rollout.samples=2"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, name, flags, words):
    with pytest.raises(UserError, match=words):
        check_online(small(tmp_path, name, *flags))


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--model.train=full", "model.train='full' with method distillation_dpo"),
        ("--model.gradient_checkpointing=true", "gradient_checkpointing"),
        ("--training.reference_every=2", "reference_every"),
    ],
)
def test_roles_that_do_not_fit(tmp_path, flag, words):
    run = small(tmp_path, "distillation_dpo", flag)
    with pytest.raises(UserError, match=words):
        check_roles(run, build(run.method))
