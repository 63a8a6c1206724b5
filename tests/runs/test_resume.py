"""The same run: its resolved record, and resuming by content instead of by path."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffalign.config.schema import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Run,
    TrainingConfig,
)
from diffalign.errors import UserError
from diffalign.methods import build
from diffalign.runs.align import align
from diffalign.runs.resume import Resumption, check_content, is_allowed, portable, resolved
from diffalign.runs.validate import read_run
from diffalign.training.checkpoint import Checkpoints, Snapshot
from diffalign.utils.lock import locked

TINY = {"targets": ("to_q",), "rank": 2}


def same_run(**changes):
    run = Run(**changes)
    return Resumption(resolved(run, build(run.method)), 1)


def test_a_default_that_is_spelled_out_is_the_same_run():
    plain = same_run(method={"type": "dpo"}, strategies=({"type": "sdpo"},))
    spelled = same_run(
        method={"type": "dpo", "beta": 5000.0, "loss": "logistic", "noising": {"type": "forward"}},
        strategies=({"type": "sdpo", "mu": 0.9, "over": "batch"},),
    )
    assert plain.settings == spelled.settings
    assert (
        plain.settings["method.loss.type"] == "logistic" and plain.settings["method.noising.shared"] is True
    )
    other = same_run(method={"type": "dpo", "loss": "ipo"}, strategies=({"type": "sdpo"},))
    assert plain.compare(other.settings, plain.settings)[0].startswith("method.loss")


def test_a_checkpoint_of_an_earlier_version_is_read_in_todays_terms():
    """It holds the method without its defaults, paths, and nothing of settings that came later."""
    now = same_run(
        method={"type": "dpo", "beta": 100}, data=DataConfig(path="p"), model=ModelConfig(path="m")
    )
    old = {k: v for k, v in now.settings.items() if not k.startswith("method.")}
    for later in ("model.dropout", "data.own_sizes", "training.epochs"):
        old.pop(later, None)
    old |= {"method.type": "dpo", "method.beta": 100, "data.path": "p", "model.path": "m", "strategies": []}
    old = json.loads(json.dumps(old))
    current = json.loads(json.dumps(now.settings))
    assert now.compare(old, current) == []
    assert now.compare({**old, "data.path": "q"}, current) == [
        "data.path is 'q' in the checkpoint and 'p' now"
    ]
    assert now.compare({**old, "method.beta": 7}, current) == [
        "method.beta is 7.0 in the checkpoint and 100.0 now"
    ]
    with pytest.raises(UserError, match=r"cannot be built by this version of diffalign"):
        now.compare({**old, "method.gone": 1}, current)


def test_what_resume_allow_names_may_differ():
    one = same_run()
    other = same_run(
        training=TrainingConfig(seed=3), resume_allow=("learning_rate", "training"), data=DataConfig(limit=3)
    )
    changed = {**one.settings, "optimizer.learning_rate": 1.0, "data.limit": None}
    changed, current = json.loads(json.dumps([changed, other.settings]))
    assert other.compare(changed, current) == ["data.limit is None in the checkpoint and 3 now"]
    assert is_allowed("optimizer.learning_rate", ["optimizer"]) and not is_allowed("data.flip", ["lip"])
    with pytest.raises(UserError, match=r"learning_rat.*learning_rate"):
        same_run(resume_allow=("learning_rat",)).compare(one.settings, one.settings)


def test_other_processes_go_on_offline_alone():
    """A step of the same groups is the same step, but a round has so many prompts of each process."""

    def told(rollout):
        runs = [Run(training=TrainingConfig(batch_size=size), rollout=rollout) for size in (2, 4)]
        two, one = (
            Resumption(resolved(run, build(run.method)), n) for run, n in zip(runs, (2, 1), strict=True)
        )
        return one.compare(json.loads(json.dumps(two.settings)), json.loads(json.dumps(one.settings)))

    assert told(RolloutConfig()) == []
    assert told(RolloutConfig(prompts="tiny:train")) == [
        "processes is 2 in the checkpoint and 1 now",
        "training.batch_size is 2 in the checkpoint and 4 now",
    ]


def test_another_schedule_names_no_length_that_was_not_recorded():
    """The length of a run at a constant rate is free, so its checkpoint has none to compare."""

    def recorded(run):
        return json.loads(json.dumps(run.settings))

    constant = same_run(training=TrainingConfig(steps=60))
    linear = same_run(training=TrainingConfig(steps=60), optimizer=OptimizerConfig(schedule="linear"))
    longer = same_run(training=TrainingConfig(steps=70), optimizer=OptimizerConfig(schedule="linear"))
    assert linear.compare(recorded(constant), recorded(linear)) == [
        "optimizer.schedule is 'constant' in the checkpoint and 'linear' now"
    ]
    assert constant.compare(recorded(linear), recorded(constant)) == [
        "optimizer.schedule is 'linear' in the checkpoint and 'constant' now"
    ]
    assert longer.compare(recorded(linear), recorded(longer)) == [
        "training.steps is 60 in the checkpoint and 70 now"
    ]
    older = {k: v for k, v in recorded(linear).items() if k != "training.epochs"}
    epochs = same_run(
        training=TrainingConfig(steps=60, epochs=2.0), optimizer=OptimizerConfig(schedule="linear")
    )
    assert epochs.compare(older, recorded(epochs)) == [
        "training.epochs is None in the checkpoint and 2.0 now"
    ]


def test_other_content_is_refused_unless_it_is_allowed():
    snapshot = Snapshot(1, {}, {}, {}, {}, content={"data": "a", "model": "b"})
    check_content(snapshot, {"data": "a", "model": "b"}, ())
    check_content(None, {"data": "x", "model": "b"}, ())
    check_content(Snapshot(1, {}, {}, {}, {}), {"data": "x", "model": "b"}, ())
    check_content(snapshot, {"data": "x", "model": "b"}, ("data",))
    with pytest.raises(UserError, match=r"the data of this run.*content differs.*--resume.allow data"):
        check_content(snapshot, {"data": "x", "model": "b"}, ("model",))


def test_latest_on_a_first_start_starts(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.start("latest") is None
    with pytest.raises(UserError, match=r"no checkpoint 'step-3'"):
        checkpoints.start("step-3")
    checkpoints.save(Snapshot(2, {"a": torch.ones(1)}, {}, {"state": {}, "param_groups": []}, {}))
    assert checkpoints.start("latest").step == 2
    (tmp_path / "checkpoints" / "step-2" / "state.json").unlink()
    with pytest.raises(UserError, match=r"no complete checkpoint.*step-2 is damaged: state\.json"):
        checkpoints.start("latest")


def pairs(folder, shades=(200, 120, 40)):
    for side in ("w", "l"):
        (folder / side).mkdir(parents=True)
    for number, shade in enumerate(shades):
        Image.new("RGB", (32, 32), (shade, 0, 0)).save(folder / "w" / f"{number}.png")
        Image.new("RGB", (32, 32), (0, 0, shade)).save(folder / "l" / f"{number}.png")
        (folder / "w" / f"{number}.txt").write_text(f"a red square {number}")
    return folder


def test_a_moved_set_goes_on_and_another_one_does_not(tmp_path, monkeypatch):
    """One run, continued from ``p``, from a copy of it by a relative path, and from other images."""
    monkeypatch.chdir(tmp_path)
    pairs(tmp_path / "p")
    shutil.copytree("p", "copy")
    pairs(tmp_path / "other", (201, 120, 40))
    run = Run(
        output="out",
        resume="latest",
        model=ModelConfig(path="tiny:sd15", lora=LoraConfig(**TINY)),
        data=DataConfig(path=str(tmp_path / "p"), resolution=32, holdout=0),
        training=TrainingConfig(steps=1),
    )
    lines = []
    assert align(run, lines.append).steps == 1
    assert any("has no checkpoint yet, so a new run starts" in line for line in lines)
    assert "training: 1 step of 1 group, 0.333 epochs of 3 groups" in lines
    recorded = read_run("out/config.yaml")
    assert (recorded.resume, recorded.output) == (None, str(tmp_path / "out"))
    assert recorded.data.path == str(tmp_path / "p") and recorded.method["loss"]["type"] == "logistic"
    spelled = {"type": "dpo", "loss": "logistic"}
    moved = replace(run, method=spelled, data=replace(run.data, path="copy"))
    epochs = replace(moved, training=replace(run.training, epochs=0.5))
    assert align(epochs, lines.append).steps == 2  # half an epoch of three groups, rounded up
    other = replace(epochs, data=replace(run.data, path="other"))
    with pytest.raises(UserError, match=r"the data of this run.*content differs"):
        align(other, lines.append)
    longer = replace(other, resume_allow=("data",), training=replace(run.training, steps=3))
    assert align(longer, lines.append).steps == 3


def test_a_record_is_the_same_run_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("")
    run = Run(
        output="out",
        resume="latest",
        overwrite=True,
        data=DataConfig(path="p.jsonl", cache_dir="kept"),
        model=ModelConfig(path="owner/name"),
        method={"type": "inpo", "noising": {"type": "inversion", "cache": "inverted"}},
    )
    record = portable(run)
    assert (record.resume, record.overwrite, record.model.path) == (None, False, "owner/name")
    assert record.output == str(tmp_path / "out") and record.data.path == str(tmp_path / "p.jsonl")
    assert record.data.cache_dir == str(tmp_path / "kept")
    assert record.method["noising"]["cache"] == str(tmp_path / "inverted")
    assert portable(record) == record


HOLD = "import sys, time; from pathlib import Path; from diffalign.utils.lock import locked\n" + (
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
)


def test_one_process_at_a_time_writes_a_run_folder(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        held = pytest.raises(UserError, match=f"another run writes .*process {other.pid}.*another --output")
        with held, locked(tmp_path):
            pytest.fail("two runs hold one folder")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with locked(tmp_path):  # a process that was killed holds nothing
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
