"""Packages for quantised weights: diffusers imports them in runs that quantise nothing too."""

import logging
import subprocess
import sys

import pytest

from diffalign.cli import main
from diffalign.utils.notices import PACKAGES


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
