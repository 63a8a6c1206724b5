"""Output paths of commands: checked before anything loads; a moved run resumes at its new place."""

import argparse
import os
import sys
from pathlib import Path

import pytest

from diffalign.cli import main
from diffalign.cli.common import output_file, output_folder
from diffalign.cli.flags import read_flags, resolve
from diffalign.config.io import to_yaml
from diffalign.config.schema import DataConfig, ModelConfig, Run


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (output_folder, "file", "is a file; allowed: a folder"),
        (output_file, "folder", "is a folder; allowed: a file"),
        (output_folder, "file/below", "file' is a file; allowed: a folder"),
        (output_folder, "loop", "is a link to nothing"),
        (output_file, "x" * 300, "too long for a file name"),
        (output_folder, "a\0b", "holds a null byte"),
    ],
)
def test_where_nothing_can_be_written(kind, name, message, place):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        kind(str(place / name))


@pytest.mark.parametrize("text", ["", "  ", "~nosuchuser/x"])
def test_names_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no name|no home folder"):
        output_folder(text)


def test_new_and_present_places(place):
    assert output_folder(str(place / "a" / "b")) == str(place / "a" / "b")
    assert output_folder(str(place / "folder")) == str(place / "folder")
    assert output_file(str(place / "file")) == str(place / "file")
    assert output_folder("~/x") == str(Path.home() / "x")


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "tiny:sd15", "--prompts", "tiny:test", "--output", "file"],
        ["evaluate", "--run", "folder", "--prompts", "a", "--rewards", "jpeg", "--output", ""],
        ["score", "folder", "--rewards", "jpeg", "--output", "folder"],
        ["pairs", "folder", "--rewards", "jpeg", "--output", "folder"],
        ["data", "tiny:pairs", "--page", "folder"],
        ["demo", "--output", "file"],
        ["edit", "tiny:sdxl", "--from", "a", "--to", "b", "--output", "file/below"],
        ["edit", "tiny:sdxl", "--from", "a", "--to", "b", "--output", "file", "--overwrite"],
        ["export", "folder", "--to", "kohya", "--output", "file/below"],
        ["time-labels", "folder", "--labels", "folder"],
        ["displacement", "tiny_sdxl_dpo", "--output", "file"],
        ["label-segments", "folder", "--by", "file", "--answers", "folder"],
        ["agreement", "tiny:pairs", "--rewards", "jpeg", "--cache", "folder"],
    ],
)
def test_commands_tell_it_first(argv, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "diffalign.models.loading", None)  # nothing is loaded before it is told
    assert main(argv) == 2
    assert "; allowed: a f" in capsys.readouterr().err


def test_near_without_its_kind_of_duplicates(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["pairs", "folder", "--rewards", "jpeg", "--near", "5", "--output", "p.jsonl"]) == 2
    assert "--near 5 is for --dedup near, not exact" in capsys.readouterr().err


def test_a_moved_run_goes_on_where_it_lies(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    (new / "checkpoints").mkdir(parents=True)
    run = Run(output=str(old), model=ModelConfig(path="tiny:sd15"), data=DataConfig(path="tiny:pairs"))
    (new / "config.yaml").write_text(to_yaml(run))
    found, notes = resolve(read_flags([str(new / "config.yaml"), "--resume", "latest"]))
    assert found.output == str(new)
    assert notes == [f"the run goes on in {new}, where its config.yaml lies; it was made in {old}"]
    found, notes = resolve(read_flags([str(new / "config.yaml"), "--output", str(old)]))
    assert (found.output, notes) == (str(old), [])
    (new / "recipe.yaml").write_text(to_yaml(run))
    assert resolve(read_flags([str(new / "recipe.yaml")]))[0].output == str(old)


def test_scores_of_images_whose_folder_cannot_be_written(place, monkeypatch, capsys):
    """The folder is found to be so before a reward is loaded, and the message names the option that helps."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place / "folder")
    assert main(["score", str(place / "folder"), "--rewards", "jpeg"]) == 2
    told = capsys.readouterr().err
    assert "folder' cannot be written" in told
    assert "--output FILE writes the scores elsewhere" in told
