"""The speed benchmark on a tiny model: processes measured alike, rows that resume, ratios by hand."""

import json
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from benchmarks import profile, record, speed, speed_arms, speed_child, speed_page, speed_real
from benchmarks.speed import Plan
from benchmarks.speed_real import BETAS, FLOW, Size
from diffalign.errors import UserError

TINY = {
    "unet": {
        "block_out_channels": (32, 32, 64),
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (1, 1, 2),
        "cross_attention_dim": 64,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    },
    "vae": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "text_encoder_2": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
}
SCRIPT = """
import sys, time, json
import torch, wandb
from pathlib import Path
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
Path({told!r}).write_text(json.dumps(sys.argv))
weight = torch.nn.Parameter(torch.zeros(3))
optimizer = torch.optim.AdamW([weight])
for number in range(int(arguments["--max_train_steps"])):
    if number == 1:
        held = torch.ones(2**26)  # 256 MiB
    until = time.process_time() + (1.0 if number == 0 else 0.25)
    while time.process_time() < until:
        pass
    weight.grad = torch.ones(3)
    optimizer.step()
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "HERE", tmp_path / "benchmarks")
    monkeypatch.setattr(record, "WORK", tmp_path / "work")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(told=str(tmp_path / "told.json")))
    folder = tmp_path / "speed"
    folder.mkdir()
    return Plan(folder, steps=3, batch=1, resolution=64, script=str(script), different=TINY, side=64)


def test_ours_and_a_script_are_measured_by_the_same_hooks(plan, tmp_path, monkeypatch):
    arm = next(arm for arm in speed_arms.ARMS if arm.name == "checkpointing")
    ours, theirs = (speed.row_of(plan, arm, tool, 0) for tool in ("ours", "script"))
    for row in (ours, theirs):
        assert len(row["stamps"]) == 4, "the making of the optimizer, and three steps"
        wall, processor, inside = zip(*row["stamps"], strict=True)
        assert list(wall) == sorted(wall) and list(processor) == sorted(processor)
        assert 0 == inside[0] < inside[-1] <= processor[-1] - processor[0] + 0.02
        assert row["whole_processor"] >= row["processor"] - 0.1 >= processor[-1] - 0.2
        assert row["peak"] >= row["peak_training"] > 2**26 and row["matmul"] > 0
    assert 0.25 <= speed_page.step(theirs, 1) < 0.75 < 3 * speed_page.step(theirs, 1, first=True) / 2
    assert theirs["peak_training"] > 2**28
    words = json.loads((tmp_path / "told.json").read_text())
    given = dict(zip(words[1:-2:2], words[2:-2:2], strict=True))
    assert given["--train_batch_size"] == "1" and given["--rank"] == "16"
    assert (given["--resolution"], given["--learning_rate"]) == ("64", "1e-05")
    assert words[-2:] == ["--no_hflip", "--gradient_checkpointing"]
    speed_page.write()
    page = (record.HERE / "speed.md").read_text()
    ratio = speed_page.step(ours, 1) / speed_page.step(theirs, 1)
    assert f"| checkpointing | {ratio:.2f} |" in page
    monkeypatch.setattr(speed, "measured", lambda *_: pytest.fail("a row that is there is not made again"))
    assert speed.row_of(plan, arm, "ours", 0) == ours


def test_a_job_that_fails_says_how(plan):
    broken = plan.folder / "broken.py"
    broken.write_text("raise ValueError('no such weight')")
    job = {"kind": "script", "threads": 1, "script": str(broken), "arguments": []}
    with pytest.raises(RuntimeError, match="no such weight"):
        speed.measured(plan.folder, job)


def test_repetitions_alternate():
    arms = [arm for arm in speed_arms.ARMS if arm.name in ("lora", "full")]
    order = [(arm.name, tool, repetition) for arm, tool, repetition in speed.wanted(arms, 2, script=True)]
    once = [("lora", "ours"), ("lora", "script"), ("full", "ours")]  # the script trains LoRA alone
    assert order == [(*pair, repetition) for repetition in (0, 1) for pair in once]
    with pytest.raises(UserError, match="no such file"):
        speed.main(["--against", "nowhere.py"])


def test_figures_by_hand():
    row = {"stamps": [[0, 0, 0], [10, 8, 1], [13, 10, 2], [17, 11, 4]], "warm": 1, "asked": {"batch": 2}}
    assert speed_page.step(row, 0) == 3.5 and speed_page.step(row, 1) == 1.5
    assert speed_page.step(row, 2) == 1.5 and speed_page.step(row, 1, first=True) == pytest.approx(11 / 3)
    assert speed_page.pairs_a_second(row) == pytest.approx(4 / 3)
    assert speed_page.spread([3.0, 1.0, 2.0], 1) == "2.0 [1.0, 3.0]"
    told = SimpleNamespace(policy_flops=3, backward_flops=5, forward_flops=2)
    assert speed_real.useful(told) == 20 and speed_real.useful(told, reference=False) == 16


@pytest.mark.parametrize(
    ("path", "frames", "scheduler", "flags"),
    [
        ("tiny:sdxl", None, BETAS, ("--data.reference_bank=1",)),
        ("tiny:sd3", None, FLOW, ("--model.gradient_checkpointing=true",)),
        ("tiny:wan", 5, FLOW, ("--model.train=full",)),
    ],
)
def test_steps_on_a_network_that_is_made_on_the_device(path, frames, scheduler, flags, monkeypatch):
    monkeypatch.setitem(speed_real.SIZES, "tiny", Size(path, 32, 2, frames, scheduler))
    steps = []
    handle = torch_optimizer.register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        speed_real.steps_of("tiny", flags, steps=2, batch=2)
    finally:
        handle.remove()
    assert len(steps) == 2
    assert speed_real.flops_per_pair("tiny", flags) > 1e6


def test_the_speed_of_a_product():
    assert 1e8 < speed_child.matmul_flops("cpu", torch.float32, 256) < 1e13


def test_a_profile_that_is_interrupted_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["profile", "--model", "tiny", "--steps", "3"])
    monkeypatch.setattr(profile, "WARM", 2)
    train = profile.train

    def interrupted(**named):
        class Stop:
            on_start = on_end = staticmethod(lambda state: None)

            def on_step(self, state):
                if state.step == 1:
                    signal.raise_signal(signal.SIGINT)

        return train(**{**named, "hooks": [*named["hooks"], Stop()]})

    monkeypatch.setattr(profile, "train", interrupted)
    with pytest.raises(SystemExit, match="interrupted after 0 counted steps of tiny"):
        profile.main()
    assert capsys.readouterr().out == ""
