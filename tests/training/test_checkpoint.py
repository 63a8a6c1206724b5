import io
import json
import os
import re
import shutil
import signal
import zlib
from dataclasses import replace

import pytest
import torch

from diffalign.config.schema import (
    CheckpointConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)
from diffalign.errors import UserError
from diffalign.training import shard_files
from diffalign.training.checkpoint import Checkpoints, Snapshot, fingerprint
from diffalign.training.hooks import SaveCheckpoints, standard_hooks
from diffalign.utils.text import read_json_lines
from tests.training.toys import Probe, Trial, distance, same, weights

LOGGING = LoggingConfig(every=4, trackers=())


def checkpoints_in(folder, settings=None, optimizer=None, limit=2, **sections):
    settings, optimizer = settings or TrainingConfig(), optimizer or OptimizerConfig()
    return Checkpoints(folder / "checkpoints", limit, fingerprint(settings, optimizer, 1, **sections))


def records(folder):
    return [
        {k: v for k, v in r.items() if k not in ("samples_per_second", "peak_memory_gib")}
        for r in read_json_lines(folder / "metrics.jsonl")
    ]


def logged_run(folder, settings, optimizer, resume=None, extra=(), every=100):
    checkpoints = checkpoints_in(folder, settings, optimizer)
    hooks = standard_hooks(folder, LOGGING, CheckpointConfig(every=every), checkpoints, extra)
    trial = Trial(settings=settings, optimizer=optimizer, dropout=0.3, ties=(2, 3, 4, 5), dtype=torch.float32)
    trial.hooks, trial.resume = hooks, checkpoints.start(resume)
    return trial.run()


def same_optimizer(a, b):
    one, two = a.optimizer.state_dict(), b.optimizer.state_dict()
    return one["param_groups"] == two["param_groups"] and all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(two["state"][i][k]))
        for i, s in one["state"].items()
        for k, v in s.items()
    )


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_resuming_is_exact_to_the_bit(tmp_path, kind, capfd):
    """Rule 7: 10 steps, an interruption, 10 more == 20 steps: parameters, optimizer, average, guard, metrics.

    The checkpoint falls in the middle of a logging window (every 4) and of an epoch, and there is dropout.
    """
    settings = TrainingConfig(
        steps=20, batch_size=5, accumulation=2, max_grad_norm=0.05, ema_decay=0.9, spike_factor=3.0, seed=5
    )
    optimizer = OptimizerConfig(type=kind, learning_rate=1e-2, schedule="cosine", warmup_steps=3)
    whole = logged_run(tmp_path / "whole", settings, optimizer)
    stop = Probe(lambda state: state.step == 9 and os.kill(os.getpid(), signal.SIGINT))
    first = logged_run(tmp_path / "parts", settings, optimizer, extra=[stop])
    assert (first.interrupted, first.step, whole.step) == (True, 10, 20)
    second = logged_run(tmp_path / "parts", settings, optimizer, resume="latest")

    assert (second.start_step, second.step, second.micro_step) == (10, 20, 40)
    assert second.seconds > first.seconds > 0
    assert same(weights(whole), weights(second))
    assert distance(weights(first), weights(second)) > 1e-3
    assert same_optimizer(whole, second)
    assert same(whole.ema.state_dict(), second.ema.state_dict())
    assert whole.guard == second.guard
    assert records(tmp_path / "whole") == records(tmp_path / "parts")
    assert [r["step"] for r in records(tmp_path / "whole")] == [4, 8, 12, 16, 20]
    assert "interrupted: finishing this step, then saving a checkpoint" in capfd.readouterr().err


def test_a_crash_after_a_checkpoint_repeats_the_same_steps(tmp_path):
    """Records and checkpoints written beyond the one resumed from are replaced, not doubled."""
    settings, optimizer = TrainingConfig(steps=12, batch_size=4), OptimizerConfig(learning_rate=1e-2)
    whole = logged_run(tmp_path / "whole", settings, optimizer)

    def crash(state):
        if state.step == 11:
            raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        logged_run(tmp_path / "parts", settings, optimizer, extra=[Probe(crash)], every=5)
    assert [r["step"] for r in records(tmp_path / "parts")] == [4, 8]
    second = logged_run(tmp_path / "parts", settings, optimizer, resume="step-5", every=5)
    assert second.start_step == 5
    assert same(weights(whole), weights(second))
    assert records(tmp_path / "whole") == records(tmp_path / "parts")


def test_a_finished_run_can_be_extended(tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e-2)
    whole = logged_run(tmp_path / "whole", TrainingConfig(steps=8, batch_size=4), optimizer)
    logged_run(tmp_path / "parts", TrainingConfig(steps=4, batch_size=4), optimizer)
    second = logged_run(tmp_path / "parts", TrainingConfig(steps=8, batch_size=4), optimizer, resume="latest")
    assert same(weights(whole), weights(second))
    again = logged_run(tmp_path / "parts", TrainingConfig(steps=8, batch_size=4), optimizer, resume="latest")
    assert same(weights(second), weights(again))


def snapshot(step, value=1.0, ema=False):
    tensors = {"a.weight": torch.full((3, 2), value), "b": torch.arange(4.0) * value}
    return Snapshot(
        step,
        tensors,
        {n: t + 1 for n, t in tensors.items()} if ema else {},
        {"state": {0: {"m": torch.ones(2)}}, "param_groups": []},
        {"n": 1},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    path = checkpoints.save(snapshot(7, ema=True))
    assert sorted(p.name for p in path.iterdir()) == [
        "ema.safetensors",
        "optimizer.pt",
        "state.json",
        "trainable.safetensors",
    ]
    for which in ("latest", "step-7", str(path)):
        loaded = checkpoints.load(which)
        assert loaded.step == 7
        assert same(loaded.trainable, snapshot(7).trainable)
        assert same(loaded.ema, snapshot(7, ema=True).ema)
        assert torch.equal(loaded.optimizer["state"][0]["m"], torch.ones(2))
        assert loaded.facts == {"n": 1}
    checkpoints.save(snapshot(7, value=2.0))  # again, after a resume from before it
    assert checkpoints.load("latest").trainable["b"][1] == 2.0


@pytest.mark.parametrize(("limit", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (0, [1, 2, 3, 4, 5])])
def test_the_limit_removes_the_oldest(tmp_path, limit, left):
    checkpoints = checkpoints_in(tmp_path, limit=limit)
    for step in range(1, 6):
        checkpoints.save(snapshot(step))
    assert checkpoints.steps() == left


def test_the_limit_never_removes_what_was_just_saved(tmp_path):
    checkpoints = checkpoints_in(tmp_path, limit=1)
    checkpoints.save(snapshot(100))
    checkpoints.save(snapshot(50))
    assert checkpoints.steps() == [50]


def test_a_run_that_goes_back_does_not_mix_with_what_it_left(tmp_path):
    """From step 2 of 2, 4, 6: "latest" is then what it saved, and the limit removes none of its own first."""
    lines = []
    checkpoints = replace(checkpoints_in(tmp_path, limit=3), tell=lines.append)
    for step in (2, 4, 6):
        checkpoints.save(snapshot(step))
    assert checkpoints.start("latest").step == 6 and not lines
    assert checkpoints.start("step-2").step == 2
    assert "has step-4, step-6 too, removed when the run, which goes on from step 2, saves" in lines.pop()
    checkpoints.save(snapshot(3))
    assert checkpoints.steps() == [2, 3] and checkpoints.load("latest").step == 3
    assert "removed step-4, step-6, made before" in lines.pop()
    checkpoints.save(snapshot(4))
    assert checkpoints.steps() == [2, 3, 4] and not lines


def test_oldest_are_removed_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    checkpoints = checkpoints_in(tmp_path, limit=1)
    checkpoints.save(snapshot(1))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step-2: .*No space left"):
        checkpoints.save(snapshot(2))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert checkpoints.load("latest").step == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: truncate(p / "trainable.safetensors"), "trainable.safetensors has .* bytes, not"),
        (lambda p: zero(p / "optimizer.pt"), "the contents of optimizer.pt have changed"),
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: (p / "state.json").unlink(), "state.json: no such file"),
        (lambda p: truncate(p / "state.json"), "state.json: "),
    ],
    ids=["truncated", "zeroed", "missing file", "no state", "half a state"],
)
def test_latest_passes_over_a_damaged_checkpoint(tmp_path, damage, reason):
    checkpoints = checkpoints_in(tmp_path, limit=5)
    for step in (3, 10):
        checkpoints.save(snapshot(step))
    (checkpoints.folder / ".step-11.partial").mkdir()
    (checkpoints.folder / "step-notes").mkdir()
    damage(checkpoints.folder / "step-10")
    said: list[str] = []
    assert replace(checkpoints, tell=said.append).load("latest").step == 3
    (line,) = said
    assert re.match(f"warning: checkpoint .*step-10 is damaged: {reason}", line)
    assert line.endswith("; it is ignored, and the run goes on from step-3")
    with pytest.raises(UserError, match=f"step-10 is damaged: {reason}.*has step-3, step-10"):
        checkpoints.load("step-10")


def rewritten(folder, name, content):
    """Replace a file with another whose size and checksum the checkpoint states."""
    (folder / name).write_bytes(content)
    state = json.loads((folder / "state.json").read_text())
    state["files"][name] = [len(content), zlib.crc32(content)]
    (folder / "state.json").write_text(json.dumps(state))


def pickled(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("optimizer.pt", b"", "optimizer.pt: "),
        ("optimizer.pt", b"PK\x03\x04 no archive", "optimizer.pt: "),
        ("optimizer.pt", pickled([1, 2]), "optimizer.pt holds no state of an optimizer"),
        ("optimizer.pt", pickled({"state": {}}), "optimizer.pt holds no state of an optimizer"),
        ("trainable.safetensors", b"12345678 no tensors", "trainable.safetensors: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, reason):
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(snapshot(5))
    rewritten(checkpoints.folder / "step-5", name, content)
    with pytest.raises(UserError, match=f"step-5 is damaged: {reason}"):
        checkpoints.load("step-5")


def trained_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    trial = Trial()
    trial.hooks = [SaveCheckpoints(checkpoints, 0)]
    trial.run()
    return checkpoints.load("latest")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, optimizer={"state": {}, "param_groups": []}), r"optimizer\.pt does not fit"),
        (lambda s: replace(s, optimizer={**s.optimizer, "param_groups": [{"lr": 1}]}), r"no 'params'"),
        (lambda s: replace(s, facts={}), r"state\.json does not fit this run: no 'counters'"),
        (lambda s: replace(s, facts={**s.facts, "guard": None}), r"state\.json does not fit this run: "),
    ],
)
def test_a_state_that_lacks_what_the_run_has_names_its_file(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        Trial(resume=change(trained_checkpoint(tmp_path))).run()


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_damaged_parts_name_their_folder(tmp_path, name):
    folder = tmp_path / "shards"
    whole = replace(trained_checkpoint(tmp_path), ema={})
    shard_files.write(whole, folder)
    read = shard_files.read(folder, "trainable")
    assert read.keys() == whole.trainable.keys() and all(read[k].equal(whole.trainable[k]) for k in read)
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
    with pytest.raises(UserError, match="shards is damaged: "):
        shard_files.read(folder, "trainable")
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"shards is damaged: .*{name}"):
        shard_files.read(folder, "trainable")


def test_a_missing_checkpoint_says_what_there_is(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    with pytest.raises(
        UserError, match=r"no complete checkpoint to resume from; .*checkpoints has no checkpoints"
    ):
        checkpoints.load("latest")
    for step in (5, 10):
        checkpoints.save(snapshot(step))
    with pytest.raises(UserError, match=r"no checkpoint 'step-7'; .* has step-5, step-10"):
        checkpoints.start("step-7")


def test_a_fresh_run_does_not_mix_with_an_earlier_one(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.start(None) is None
    checkpoints.save(snapshot(5))
    with pytest.raises(UserError, match="has step-5 of an earlier run: continue it with --resume latest"):
        checkpoints.start(None)


def test_resuming_with_another_config_names_the_keys(tmp_path):
    settings, optimizer = TrainingConfig(batch_size=4), OptimizerConfig()
    sections = {"method": {"type": "dpo", "beta": 5000}, "model": ModelConfig(path="a")}
    checkpoints_in(tmp_path, settings, optimizer, **sections).save(snapshot(5))
    same_again = checkpoints_in(tmp_path, replace(settings, steps=9999), optimizer, **sections)
    assert same_again.load("latest").step == 5, "more steps at a constant rate are the same run"
    changed = checkpoints_in(
        tmp_path,
        replace(settings, batch_size=2),
        replace(optimizer, betas=(0.9, 0.95)),
        method={"type": "dpo", "beta": 2000, "loss": "ipo"},
        model=ModelConfig(path="a"),
    )
    with pytest.raises(UserError) as error:
        changed.load("latest")
    message = str(error.value)
    assert "method.beta is 5000 in the checkpoint and 2000 now" in message
    assert "method.loss is 'unset' in the checkpoint and 'ipo' now" in message
    assert "training.batch_size is 4 in the checkpoint and 2 now" in message
    assert "optimizer.betas is [0.9, 0.999] in the checkpoint and [0.9, 0.95] now" in message
    assert "model" not in message


def test_fingerprints():
    cosine = OptimizerConfig(schedule="cosine")
    assert "training.steps" in fingerprint(TrainingConfig(), cosine, 1), "the rate depends on it"
    assert "training.steps" not in fingerprint(TrainingConfig(), OptimizerConfig(), 1)
    flat = fingerprint(TrainingConfig(), cosine, 2, ["model.path"], model=ModelConfig(path="a"))
    assert "model.path" not in flat
    assert (flat["model.lora.rank"], flat["processes"]) == (16, 2)


def test_another_format_is_refused(tmp_path):
    checkpoints = checkpoints_in(tmp_path)
    path = checkpoints.save(snapshot(5)) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has format 99; this diffalign reads 1"):
        checkpoints.load("latest")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    other = Trial(network=torch.nn.Sequential(torch.nn.Linear(4, 2)), resume=trained_checkpoint(tmp_path))
    with pytest.raises(
        UserError, match=r"holds other tensors than this run: 8 differ, first '0.bias'.*run .2,."
    ):
        other.run()


def test_when_checkpoints_are_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=0)
    trial = Trial(settings=TrainingConfig(steps=7, batch_size=4))
    trial.hooks = [SaveCheckpoints(checkpoints, 3)]
    trial.run()
    assert checkpoints.steps() == [3, 6, 7]
    shutil.rmtree(tmp_path)
    trial = Trial(settings=TrainingConfig(steps=4, batch_size=4))
    trial.hooks = [SaveCheckpoints(checkpoints, 0)]
    trial.run()
    assert checkpoints.steps() == [4]
    with pytest.raises(UserError, match=r"checkpoint.every=-1"):
        SaveCheckpoints(checkpoints, -1)
