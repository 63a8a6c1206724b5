import builtins
import json
import sys
import types

import pytest
import torch
from accelerate import Accelerator

from diffalign.config.schema import LoggingConfig, TrainingConfig
from diffalign.errors import UserError
from diffalign.training.hooks import Every, Logging, Progress, standard_hooks
from diffalign.training.metrics import Meter, MetricsFile
from diffalign.training.trackers import open_trackers
from diffalign.utils.text import read_json_lines
from tests.training.toys import Probe, Trial


def test_the_meter_by_hand():
    meter, accelerator = Meter("cpu"), Accelerator()
    meter.add({"loss": torch.tensor(2.0), "accuracy": 0.5}, torch.tensor(3))
    meter.add({"loss": torch.tensor(6.0)}, 1.0)
    meter.add({"loss": torch.tensor(float("nan")), "accuracy": 9.0}, 0.0)  # a batch of ties
    assert meter.averages(accelerator) == {"loss": 3.0, "accuracy": 0.5}
    other = Meter("cpu")
    other.add({"loss": 0.0}, 4.0)
    meter.merge(other)
    meter.merge(other, prefix="bin/")
    assert meter.averages(accelerator) == {"loss": 1.5, "accuracy": 0.5, "bin/loss": 0.0}
    assert meter.of_all_ranks(accelerator) == [meter.state_dict()]
    again = Meter("cpu")
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert again.state_dict() == meter.state_dict()
    meter.clear()
    assert meter.averages(accelerator) == {}


def test_no_wait_for_the_device_in_a_micro_step(monkeypatch):
    """Rule 9: over 8 micro-steps the loop reads tensors on the host once, for the step's decision."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)

        def counted(self, real=real, name=name):
            frame = sys._getframe(1)
            if "/diffalign/training/" in frame.f_code.co_filename.replace("\\", "/"):
                reads.append(name)
            return real(self)

        monkeypatch.setattr(torch.Tensor, name, counted)
    Trial(settings=TrainingConfig(steps=2, batch_size=1, accumulation=8)).run()
    assert reads == ["tolist"] * 2


def test_the_file(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    file = MetricsFile(path, start_step=0)
    for step in (2, 4, 6):
        file.write(step, {"loss": step / 7, "bad": float("nan")})
    assert read_json_lines(path)[0] == {"step": 2, "loss": 2 / 7, "bad": None}, (
        "flushed at once, exact, valid JSON"
    )
    with path.open("a") as f:
        f.write('{"step": 8, "lo')  # a machine that went down
    file.close()
    file = MetricsFile(path, start_step=4)
    assert [r["step"] for r in read_json_lines(path)] == [2, 4]
    file.write(6, {"loss": 0.5})
    file.close()
    assert [r["step"] for r in read_json_lines(path)] == [2, 4, 6]
    file = MetricsFile(path, start_step=6)  # of a finished run, which measures its end again
    file.write(6, {"loss": 0.5})
    file.write(6, {"loss": 0.5, "heldout/loss": 0.7})
    file.write(7, {"loss": 0.5})
    file.close()
    ends = [{"step": 6, "loss": 0.5}, {"step": 6, "heldout/loss": 0.7}, {"step": 7, "loss": 0.5}]
    assert read_json_lines(path)[2:] == ends
    MetricsFile(path, start_step=0).close()
    assert read_json_lines(path) == []
    assert read_json_lines(tmp_path / "none.jsonl") == []


def test_what_is_logged(tmp_path):
    """Names as dashboards know them; averages over the window; extra values on their own step; the last step
    always.
    """
    trial = Trial(settings=TrainingConfig(steps=7, batch_size=3, spike_factor=5.0), ties=(0, 1, 2, 3))
    losses = []

    def extra(state):
        losses.append(state.loss)
        if state.step == 2:
            state.log({"validation/score": 0.25})

    config = LoggingConfig(every=3, trackers=("tensorboard",))
    trial.hooks = [Probe(extra), Logging(tmp_path, config, {"seed": 0})]
    trial.run()
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [2, 3, 6, 7]
    assert records[0] == {"step": 2, "validation/score": 0.25}
    assert records[1].keys() == {
        "step", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "errors/chosen", "errors/rejected", "grad_norm", "learning_rate", "samples_per_second",
        "skipped_steps", "empty_steps", "peak_memory_gib",
    }  # fmt: skip
    assert records[3]["loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert records[1]["learning_rate"] == 1e-2
    assert records[1]["samples_per_second"] > 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [
        (r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records[1:]
    ]


def test_trackers_by_name(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"unknown tracker .logging.trackers. 'tensorbord'; did you mean tensorboard"
    ):
        Logging(tmp_path, LoggingConfig(trackers=("tensorbord",)))
    with pytest.raises(UserError, match=r"logging.every=0"):
        Logging(tmp_path, LoggingConfig(every=0))
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name in ("wandb", "trackio", "torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name in ("wandb", "trackio", "tensorboard"):
        with pytest.raises(UserError, match=f"names {name}, which is not installed: pip install {name}"):
            open_trackers([name], tmp_path, "p", {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_dashboards_get_the_project_and_keep_their_run(tmp_path, monkeypatch, name):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    for start in (0, 10, 0):
        (tracker,) = open_trackers([name], tmp_path, "sdxl", {"beta": 1}, start)
        tracker.log(start + 1, {"loss": 0.5})
        tracker.close()
    first, second, third = (c for c in calls if isinstance(c, dict))
    assert first["project"] == "sdxl"
    assert first["config"] == {"beta": 1}
    assert first == second, "a resumed run is the same run"
    assert first != third, "a fresh one is another"
    assert calls[1:3] == [("log", 1, {"loss": 0.5}), ("finish",)]


def test_every_and_progress(capsys):
    called = []
    trial = Trial(settings=TrainingConfig(steps=7, batch_size=2))
    trial.hooks = [
        Every(3, lambda state: called.append(state.step)),
        Every(0, lambda state: called.append("never")),
        Progress(),
    ]
    trial.run()
    assert called == [3, 6]
    line = capsys.readouterr().err
    assert "training" in line
    assert "7/7" in line
    assert "loss" in line


def test_the_standard_order(tmp_path):
    from diffalign.config.schema import CheckpointConfig
    from diffalign.training.checkpoint import Checkpoints

    mine = Every(1, lambda state: state.log({"mine": float(state.step)}))
    hooks = standard_hooks(
        tmp_path,
        LoggingConfig(every=2, trackers=()),
        CheckpointConfig(),
        Checkpoints(tmp_path / "checkpoints"),
        [mine],
    )
    trial = Trial(settings=TrainingConfig(steps=2, batch_size=2))
    trial.hooks = hooks
    trial.run()
    assert [(r["step"], r["mine"]) for r in read_json_lines(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
    ]
    assert (tmp_path / "checkpoints" / "step-2").is_dir()
