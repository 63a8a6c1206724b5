"""Out of memory ends with advice and status 2; a finished run reports its peak memory."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from diffalign.cli import main
from diffalign.config.schema import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from diffalign.errors import UserError
from diffalign.evaluation import running
from diffalign.evaluation.drawing import sampling
from diffalign.runs import align as job
from diffalign.runs import setup
from diffalign.runs.memory_advice import when_encoding, when_loading, when_training, when_validating
from diffalign.utils import memory as out_of_memory
from diffalign.utils.memory import OutOfMemory, Peak, advised, peak_memory, ran_out
from tests.cli.conftest import finished, world  # noqa: F401

CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8 GiB"
)
VIDEO = Run(
    model=ModelConfig(train="full"),
    data=DataConfig(frames=49, height=480, width=832),
    training=TrainingConfig(batch_size=4, accumulation=2),
)
FRUGAL = Run(
    model=ModelConfig(
        gradient_checkpointing=True, offload_activations=True, vae_tiling=True, dtype="bfloat16"
    ),
    data=DataConfig(cache_batch_size=1),
    training=TrainingConfig(mixed_precision="bf16"),
    optimizer=OptimizerConfig(type="adamw8bit"),
    rollout=RolloutConfig(prompts="p.txt", batch_size=1),
)


def options(advice):
    """Return the options that pieces of advice name, in their order."""
    return [word.removeprefix("--") for text in advice for word in text.split() if word.startswith("--")]


def test_which_errors_are_a_lack_of_memory():
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**45)
    for error in (real.value, CUDA, MemoryError(), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling x")):
        assert ran_out(error)
    for error in (
        RuntimeError("shapes differ"),
        UserError("CUDA out of memory"),
        ValueError("not enough memory"),
    ):
        assert not ran_out(error)


def test_advice_of_training_names_what_is_not_set_in_the_order_of_effect():
    assert options(when_training(VIDEO)) == [
        "model.gradient_checkpointing", "training.batch_size", "training.accumulation",
        "training.mixed_precision", "model.dtype", "data.frames", "data.height", "data.width",
        "model.offload_activations", "optimizer.type", "model.train",
    ]  # fmt: skip
    words = "; ".join(when_training(VIDEO))
    assert "--training.accumulation 8 (the same step)" in words and "--data.frames 25 (now 49)" in words
    assert "paged_adamw8bit (2 bytes a weight, now 8" in words
    whole = replace(FRUGAL, model=replace(FRUGAL.model, train="full"))
    assert "--optimizer.type paged_adamw8bit (2 bytes a weight, now 2" in "; ".join(when_training(whole))
    spread = replace(VIDEO, training=replace(VIDEO.training, shard="full"))
    assert "optimizer.type" not in options(when_training(spread)), "sharded moments are those of adamw"
    assert options(when_training(FRUGAL)) == ["data.resolution"]
    online = replace(VIDEO, rollout=RolloutConfig(prompts="p.txt", batch_size=8, resolution=256))
    named = options(when_training(online))
    assert {"rollout.batch_size", "rollout.resolution", "model.vae_tiling"} <= set(named)
    assert not {"rollout.part", "method.time.strata"} & set(named)  # pairs are compared, at one time
    awm = replace(FRUGAL, method={"type": "awm", "time": {"type": "stratified", "strata": 6}})
    awm = replace(awm, rollout=replace(awm.rollout, samples=24, part=4))
    advice = when_training(awm)
    assert "--rollout.part 1 (now 4) with 4 times the --training.accumulation" in advice
    assert "--method.time.strata 1 (now 6)" in advice
    least = {"type": "awm", "time": {"type": "stratified", "strata": 1}}
    least = replace(awm, method=least, rollout=replace(awm.rollout, part=1))
    assert options(when_training(least)) == ["data.resolution"]


@pytest.mark.parametrize(("now", "fewer"), [(81, 41), (49, 25), (161, 81), (41, 17), (16, 5), (9, 5), (5, 1)])
def test_fewer_frames_are_a_number_that_models_take(now, fewer):
    advice = when_encoding(replace(VIDEO, data=replace(VIDEO.data, frames=now)))
    assert f"--data.frames {fewer} (now {now})" in advice


def test_advice_elsewhere_is_about_what_is_done_there():
    assert options(when_encoding(VIDEO)) == [
        "data.cache_batch_size", "model.vae_tiling", "data.frames", "data.height", "data.width",
        "model.dtype",
    ]  # fmt: skip
    assert options(when_encoding(FRUGAL)) == ["data.resolution"]
    assert options(when_loading(VIDEO)) == ["model.dtype"] and when_loading(FRUGAL) == []
    watched = replace(VIDEO, validation=ValidationConfig(frames=17))
    assert options(when_validating(watched)) == ["model.vae_tiling", "validation.frames", "model.dtype"]
    assert when_validating(FRUGAL) == []


def test_the_message_says_what_was_done_the_peak_and_what_helps(monkeypatch):
    monkeypatch.setattr(out_of_memory, "peak_memory", lambda: Peak(7 * 2**29, "GPU memory"))
    with pytest.raises(OutOfMemory) as caught, advised("training", ["--a b", "--c d"]):
        raise CUDA
    assert str(caught.value).startswith(
        "out of memory while training, after a peak of 3.50 GiB of GPU memory (CUDA out of memory). What "
        "helps, the most first: --a b; --c d. `diffalign estimate`"
    )
    with pytest.raises(OutOfMemory, match="while encoding"), advised("training", []), advised("encoding", []):
        raise MemoryError  # the innermost says it
    with pytest.raises(ZeroDivisionError), advised("training", []):
        raise ZeroDivisionError


def test_the_peak_is_of_this_process():
    before = peak_memory()
    held = torch.ones(80 * 2**20, dtype=torch.uint8)
    after = peak_memory()
    assert after.of == before.of == "main memory" and after.bytes >= before.bytes > 0.1 * 2**30
    assert after.bytes >= held.numel() and Peak(2**29, "GPU memory").text == "0.50 GiB of GPU memory"


def full(*arguments, **options):
    raise CUDA


@pytest.mark.parametrize(
    ("holder", "name", "command", "doing", "helps", "set_already"),
    [
        (job, "train", ["train", "good.yaml", "--model.gradient_checkpointing", "true"], "training",
         "--training.batch_size 1 --training.accumulation 2", "--model.gradient_checkpointing"),
        (setup, "encode_preferences", ["cache", "good.yaml", "--model.vae_tiling", "true"], "encoding",
         "--data.cache_batch_size 1 (now 8)", "--model.vae_tiling"),
        (sampling, "generate", ["generate", "model15", "--prompts", "prompts.txt", "--dtype", "bfloat16"],
         "drawing", "--batch-size 1", "--dtype"),
        (running, "evaluate_models", ["evaluate", "--base", "model15", "--aligned", "model15", "--prompts",
         "prompts.txt", "--rewards", "jpeg", "--batch-size", "1"], "drawing and scoring", "--dtype bfloat16",
         "--batch-size"),
    ],
)  # fmt: skip
def test_commands_end_with_advice_and_no_traceback(
    holder,
    name,
    command,
    doing,
    helps,
    set_already,
    world,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.setattr(holder, name, full)
    output = ["--output", str(tmp_path / "out")]
    with contextlib.chdir(world):
        assert main([*command, *output]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and "This is a bug" not in said
    message = next(line for line in said.splitlines() if line.startswith("error: "))
    assert f"out of memory while {doing}" in message and helps in message and set_already not in message


def test_a_finished_run_states_its_peak(finished):  # noqa: F811
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["peak_memory_gib"] > 0.1 and summary["peak_memory_of"] == "main memory"
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert 0.1 < rows[-1]["peak_memory_gib"] <= summary["peak_memory_gib"] + 1e-3
    assert "| peak memory |" in (finished / "aligned" / "README.md").read_text()
