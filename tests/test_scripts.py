"""The scripts in pipelines/ run as they are, with fewer steps."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_pipelines_are_short():
    for path in (ROOT / "pipelines").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 100, path


def test_align_sdxl(tmp_path, monkeypatch, capsys):
    few = tmp_path / "few.yaml"
    few.write_text(
        f"base: {ROOT / 'configs' / 'tiny_sdxl_dpo.yaml'}\ndata:\n  limit: 24\ntraining:\n  batch_size: 4\n"
    )
    arguments = [
        "--recipe",
        str(few),
        "--steps",
        "2",
        "--count",
        "6",
        "--sampling-steps",
        "3",
        "--guidance",
        "1",
    ]
    monkeypatch.setattr(sys, "argv", ["align_sdxl.py", *arguments, "--output", str(tmp_path / "run")])
    runpy.run_path(str(ROOT / "pipelines" / "align_sdxl.py"), run_name="__main__")
    assert "95 % interval" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["prompts"] == 6 and report["steps"] == 2


def test_iterated_rounds(tmp_path, monkeypatch, capsys):
    """Two rounds of a few prompts: the second starts from the first one's result, and both are reported."""
    few = tmp_path / "few.yaml"
    few.write_text(f"base: {ROOT / 'configs' / 'tiny_sdxl_dpo.yaml'}\ntraining:\n  batch_size: 4\n")
    arguments = ["--recipe", str(few), "--rounds", "2", "--steps", "2", "--prompts-per-round", "8"]
    arguments += ["--count", "4", "--candidates", "2", "--sampling-steps", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["iterated_rounds.py", *arguments])
    runpy.run_path(str(ROOT / "pipelines" / "iterated_rounds.py"), run_name="__main__")
    assert capsys.readouterr().out.count("95 % interval") == 2
    rows = json.loads((tmp_path / "rounds.json").read_text())
    assert [row["round"] for row in rows] == [1, 2]
    second = (tmp_path / "round-2" / "config.yaml").read_text()
    assert str(tmp_path / "round-1" / "merged") in second and "seed: 2" in second
    assert (tmp_path / "round-2" / "merged" / "model_index.json").is_file()


def human_rounds(monkeypatch, output, *more):
    """Two rounds of two prompts with two images each."""
    arguments = ["--rounds", "2", "--count", "4", "--output", str(output), *more, "--rollout.samples", "2"]
    arguments += ["--rollout.prompts_per_round", "2", "--rollout.steps", "2", "--rollout.lowest_time", "0"]
    monkeypatch.setattr(sys, "argv", ["human_rounds.py", *arguments])
    runpy.run_path(str(ROOT / "pipelines" / "human_rounds.py"), run_name="__main__")


def test_human_rounds_labelled_by_a_judge(tmp_path, monkeypatch, capsys):
    human_rounds(monkeypatch, tmp_path, "--labeller", "judge", "--reward", "jpeg")
    assert re.search(r"gain [+-]0\.\d+, 95 % interval [+-]0\.\d*[1-9]\d* to", capsys.readouterr().out)
    for number in range(2):
        lines = (tmp_path / "rollouts" / f"round-00000{number}" / "labels.jsonl").read_text().splitlines()
        scores = [json.loads(line)["scores"] for line in lines]
        assert len(scores) == 2 and None not in [score for row in scores for score in row]
    config = (tmp_path / "config.yaml").read_text()
    assert "steps: 4" in config and "reference_every: 2" in config


def test_human_rounds_ask_in_the_terminal_and_keep_every_answer(tmp_path, monkeypatch, capsys):
    def answering(*answers):
        left = list(answers)

        def answer(question):
            if not left:
                raise KeyboardInterrupt
            return left.pop(0)

        monkeypatch.setattr("builtins.input", answer)

    answering("1")
    with pytest.raises(KeyboardInterrupt):
        human_rounds(monkeypatch, tmp_path)
    labels = tmp_path / "rollouts" / "round-000000" / "labels.jsonl"
    first, second = (json.loads(line) for line in labels.read_text().splitlines())
    assert first["best"] == 1 and "best" not in second and second["scores"] == [None, None]
    shown = capsys.readouterr().out
    assert first["prompt"] in shown and f"1  {labels.parent / '0000-1.png'}" in shown
    answering("2", "-1", "the left one", "", " 0 ")  # goes on with the second prompt, then the next round
    with pytest.raises(KeyboardInterrupt):
        human_rounds(monkeypatch, tmp_path)
    assert json.loads(labels.read_text().splitlines()[1])["scores"] == [0, 0]
    labels = tmp_path / "rollouts" / "round-000001" / "labels.jsonl"
    assert json.loads(labels.read_text().splitlines()[0])["best"] == 0
