"""Packages for quantised weights: diffusers imports them in runs that quantise nothing too."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

import diffalign
from diffalign.cli import main
from diffalign.utils.notices import PACKAGES, main_logger


def test_they_say_nothing_while_they_are_imported():
    """Without the silence each says something: it names the loggers that the installed versions have."""
    code = "{}import sys, diffusers.quantizers; print('bitsandbytes' in sys.modules)"
    done = [
        subprocess.run([sys.executable, "-c", code.format(first)], capture_output=True, text=True)
        for first in ("import benchmarks; ", "")
    ]
    if any(d.stdout.split()[-1:] == ["False"] for d in done):
        pytest.skip("bitsandbytes is not installed")
    assert (done[0].returncode, done[0].stderr) == (0, "")
    assert done[1].stderr


@pytest.mark.parametrize("name", PACKAGES)
def test_the_command_line_hears_their_errors_alone(name, capsys):
    logging.getLogger(name).setLevel(logging.NOTSET)
    assert main(["--version"]) == 0
    assert logging.getLogger(name).level == logging.ERROR


@pytest.mark.parametrize(
    ("rank", "told"), [(None, True), ("", True), ("0", True), ("1", False), ("10", False)]
)
def test_notes_of_a_model_are_told_by_the_first_process(monkeypatch, caplog, rank, told):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    logger = main_logger("diffalign.models.checks")
    logger.warning("a note on the model")
    assert ("a note on the model" in caplog.text) == told
    logger.error("an error")
    assert "an error" in caplog.text


def test_rooms_of_models_tell_their_notes_once():
    """All but that of prompts, whose notes are on this process's share of them."""
    root = Path(diffalign.__file__).parent
    every = [file for room in ("models", "export") for file in (root / room).rglob("*.py")]
    own = {file.name for file in every if "getLogger(__name__)" in file.read_text(encoding="utf-8")}
    assert own == {"loaded.py"}
