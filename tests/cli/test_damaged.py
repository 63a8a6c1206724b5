"""Runs with damaged files: a one-line error names the file before any sampling."""

import json
import shutil
import warnings
from pathlib import Path

import pytest

from diffalign.cli import main
from tests.cli.conftest import finished, world  # noqa: F401


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err.rpartition("error: ")[2]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("[1]", "holds [1]; needed: a JSON object"),
        ("{", "not JSON"),
        ('{"format": 1, "step": "two"}', "step is 'two'"),
        (
            '{"format": 1, "step": 2, "facts": {}, "fingerprint": {}, "files": {"a": 1}}',
            "files lack their sizes",
        ),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_a_checkpoint_without_its_state(text, fragment, run, world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    (run / "checkpoints" / "step-2" / "state.json").write_text(text)
    argv = ["train", "good.yaml", "--output", str(run), "--resume", str(run / "checkpoints" / "step-2")]
    message = refused(argv, capsys)
    assert "step-2 is damaged: " in message and fragment in message


def test_no_complete_checkpoint(run, world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    for state in run.glob("checkpoints/*/state.json"):
        state.write_text("[]")
    message = refused(["train", "good.yaml", "--output", str(run), "--resume", "latest"], capsys)
    assert "no complete checkpoint to resume from" in message and "has step-" in message
    assert "step-2 is damaged: state.json: " in message


def test_a_damaged_newest_checkpoint_is_told_in_one_line(run, world, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    shutil.copytree(run / "checkpoints" / "step-2", run / "checkpoints" / "step-3")
    (run / "checkpoints" / "step-3" / "optimizer.pt").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["train", "good.yaml", "--output", str(run), "--resume", "latest"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert line == (
        f"warning: checkpoint {run}/checkpoints/step-3 is damaged: optimizer.pt is missing; it is ignored, "
        "and the run goes on from step-2"
    )


@pytest.mark.parametrize("command", ["--run", "--runs"])
def test_a_damaged_lora_is_told_before_the_base_draws(command, run, world, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    (run / "aligned" / "pytorch_lora_weights.safetensors").write_bytes(b"junk")
    runs = str(run) if command == "--run" else f"run,{run}"
    argv = ["evaluate", command, runs, "--prompts", "prompts.txt", "--rewards", "jpeg"]
    message = refused([*argv, "--output", str(tmp_path / "out")], capsys)
    assert "pytorch_lora_weights.safetensors' cannot be loaded" in message
    assert not list(tmp_path.rglob("*.png"))


def test_runs_of_two_seeds_are_compared(run, world, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.chdir(world)
    argv = [
        "evaluate",
        "--runs",
        f"run,{run}",
        "--prompts",
        "prompts.txt",
        "--rewards",
        "jpeg",
        "--steps",
        "1",
    ]
    assert main([*argv, "--height", "32", "--width", "32", "--output", str(tmp_path / "out"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2
