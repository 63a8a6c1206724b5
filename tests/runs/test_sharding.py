"""Weights spread over two processes: equal to one process, checkpoints that one reads, plain exports."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.config.schema import Run, TrainingConfig
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.models.starting import is_checkpoint
from diffalign.runs.align import align
from diffalign.runs.launcher import with_launcher
from diffalign.runs.role_checks import check_roles
from diffalign.training.acceleration import accelerator_for
from diffalign.training.checkpoint import read_trained
from diffalign.training.sharding import block_classes, gathered_tensor, local, placed_like, sharding_of
from tests.helpers import in_two_processes
from tests.runs.shard_worker import STEPS, recipe, variant
from tests.training.toys import network

pytestmark = pytest.mark.slow


def losses(folder: Path) -> list[float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    in_two_processes("tests.runs.shard_worker", folder, pipelines=True)
    return folder


@pytest.fixture(scope="module", params=["lora", "full"])
def both(two, request):
    """Return what is trained, the run over two processes, and the same in one, two steps longer."""
    train = request.param
    one = variant(recipe(two / f"{train}-one", train, 1, steps=STEPS + 2, ema_decay=0.9), train)
    align(replace(one, checkpoint=replace(one.checkpoint, every=STEPS)), lambda line: None)
    return train, two / train, one


def test_two_processes_with_spread_weights_are_one(both):
    _, spread, one = both
    ours, theirs = losses(Path(one.output))[:STEPS], losses(spread)[:STEPS]
    assert len(theirs) == STEPS and len({round(value, 4) for value in theirs}) > STEPS // 2
    assert theirs == pytest.approx(ours, abs=1e-5)


def test_each_process_holds_half_and_says_so(two):
    lines = (two / "lines-0.txt").read_text()
    assert (two / "lines-1.txt").read_text() == ""  # one process speaks
    held = re.findall(
        r"weights sharded over ([\dx ]+) processes \((\w+)\), ([\d.]+) GiB on each.*ResnetBlock2D", lines
    )
    assert [(shape, kind) for shape, kind, _ in held] == [("2", "full"), ("2", "full"), ("2 x 1", "hybrid")]
    half, whole_ = float(held[0][2]), float(held[2][2])  # a copy on each "node" of one process
    assert half == pytest.approx(whole_ / 2, rel=0.02)


def test_a_copy_on_each_node_is_the_same_run(two):
    assert losses(two / "hybrid") == pytest.approx(losses(two / "lora")[:3], abs=1e-6)


def test_checkpoints_are_written_in_parts_and_read_by_one_process(both):
    _, spread, one = both
    folder = spread / "checkpoints" / f"step-{STEPS}"
    parts = sorted(path.name for path in (folder / "shards").glob("*.distcp"))
    assert [name.split("_")[2] for name in parts] == ["0", "1"], parts
    assert not (folder / "trainable.safetensors").exists() and is_checkpoint(folder)
    assert torch.load(folder / "optimizer.pt", weights_only=True)["state"] == {}
    ours = read_trained(Path(one.output) / "checkpoints" / f"step-{STEPS}")
    theirs = read_trained(folder)
    assert theirs.keys() == ours.keys()
    assert max(float((theirs[n] - ours[n]).abs().max()) for n in ours) < 1e-5
    resumed = replace(one, output=str(spread), resume="latest")
    assert align(resumed, lambda line: None).steps == STEPS + 2
    assert losses(spread) == pytest.approx(losses(Path(one.output)), abs=1e-5)


def test_what_leaves_is_plain(both):
    train, spread, one = both
    ours, theirs = Path(one.output) / "aligned", spread / "aligned"
    if train == "lora":
        name = "pytorch_lora_weights.safetensors"
        first, second = load_file(ours / name), load_file(theirs / name)
        assert list((spread / "samples").glob("step-*/*.png")), "all processes drew, one wrote"
    else:
        index = json.loads((theirs / "model_index.json").read_text())
        assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
        assert (
            json.loads((theirs / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
        )
        name = "unet/diffusion_pytorch_model.safetensors"
        first, second = load_file(ours / name), load_file(theirs / name)
    assert first.keys() == second.keys()
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-5


def run_with(**training) -> Run:
    return Run(training=TrainingConfig(**training))


def test_one_process_spreads_nothing():
    settings = TrainingConfig(shard="full")
    assert sharding_of(settings, accelerator_for(settings)) is None
    tensor = torch.ones(2)
    assert (
        gathered_tensor(tensor) is tensor
        and local(tensor) is tensor
        and placed_like(tensor, tensor) is tensor
    )


def test_blocks_are_those_that_the_network_names():
    module = network()
    assert block_classes(module) == frozenset()
    module._repeated_blocks = ["Linear"]
    assert block_classes(torch.nn.Sequential(module)) == {"Linear"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"optimizer": {"type": "adafactor"}},
            "optimizer.type='adafactor' with training.shard=full.*'adamw'",
        ),
        ({"model": {"compile": True}}, "model.compile=True"),
        ({"rollout": {"prompts": "tiny:prompts"}}, "rollout.prompts"),
        ({"training": {"mixed_precision": "fp16"}}, "fp16 with training.shard=full; allowed: no, bf16"),
        (
            {"method": {"type": "inversion_dpo"}},
            "inversion_dpo, whose noisy states.*allowed: training.shard none",
        ),
    ],
)
def test_what_a_spread_run_does_not_have_is_refused_by_name(changes, words):
    run = run_with(shard="full")
    for name, fields in changes.items():
        run = replace(run, **{name: fields if name == "method" else replace(getattr(run, name), **fields)})
    with pytest.raises(UserError, match=words):
        check_roles(run, build(run.method))
    alone = replace(run, training=replace(run.training, shard="none"))
    check_roles(alone, build(alone.method))


def test_fsdp_of_the_launcher_becomes_the_runs_own(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    lines: list[str] = []
    told = with_launcher(Run(), lines.append).training
    assert (told.shard, told.reshard) == ("full", False)
    assert lines == [
        "training.shard=full, training.reshard=False from the launcher (ACCELERATE_USE_FSDP, version 2)"
    ]
    assert with_launcher(run_with(shard="hybrid"), lines.append).training.shard == "hybrid"
    accelerator_for(TrainingConfig())
    assert "ACCELERATE_USE_FSDP" not in os.environ, "transformers would load weights on one process only"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "FSDP of version 1.*allowed.*fsdp_version 2"),
        ("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2", "2 copies.*training.shard hybrid"),
    ],
)
def test_what_else_the_launcher_asks_for_is_refused(monkeypatch, variable, value, words):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        with_launcher(Run(), print)
