"""The command line as a whole: help, speed, exit statuses."""

import errno
import json
import os
import subprocess
import sys

import pytest

from diffalign import cli
from diffalign.cli import COMMANDS, main
from diffalign.cli.aliases import ALIASES
from diffalign.config.io import dotted_names
from diffalign.errors import UserError


def test_help_takes_less_than_half_a_second_of_processor_time():
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "diffalign", "--help"], capture_output=True, text=True, check=True
        )
        after = os.times()
        seconds.append(sum(after[2:4]) - sum(before[2:4]))  # user and system time of children
    assert all(name in done.stdout for name in COMMANDS)
    assert min(seconds) <= 0.5


def test_importing_the_package_loads_no_large_library():
    code = "import sys, diffalign\nprint({'torch', 'diffusers', 'transformers'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_no_torch(name):
    code = (
        f"import sys\nfrom diffalign.cli import main\nstatus = main(['{name}', '--help'])\n"
        "print(status, 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert f"usage: diffalign {name}" in done.stdout
    assert "examples:" in done.stdout
    assert all(len(line) <= 112 for line in done.stdout.splitlines())


def test_help_of_train_names_every_field_and_every_alias(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in [*dotted_names(), *ALIASES]:
        assert f"--{name}" in text, name


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "diffalign 0.1.0\n"


def test_no_command_is_an_error_and_shows_the_commands(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["methods", "models", "rewards"])
def test_listings_as_table_and_json(name, capsys):
    assert main([name]) == 0
    table = capsys.readouterr().out
    assert main([name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows and all(row["name"] in table and row["title"] for row in rows)


def test_one_method_and_one_reward_are_described(capsys):
    assert main(["methods", "dpo"]) == 0
    assert "2311.12908" in (text := capsys.readouterr().out) and "beta: 5000" in text
    assert main(["rewards", "pickscore"]) == 0
    assert "2305.01569" in capsys.readouterr().out


def test_strategies_are_a_second_list(capsys):
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert text.index("dpo: Diffusion-DPO") < text.index("strategies, around any") < text.index("sdpo: Diff")
    assert main(["methods", "sdpo"]) == 0
    text = capsys.readouterr().out
    assert "2511.03317" in text and "mu: 0.9" in text and "--strategies sdpo" in text
    assert main(["methods", "sft", "--json"]) == 0
    assert [row["kind"] for row in json.loads(capsys.readouterr().out)] == ["method", "strategy"]


def test_env_is_a_block_of_facts(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["diffalign"] == "0.1.0" and facts["torch"]
    assert main(["env"]) == 0
    assert "diffusers" in capsys.readouterr().out


def test_env_never_prints_values_of_variables(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main(["env"])
    text = capsys.readouterr().out
    assert "HF_TOKEN" in text and "hf_secret" not in text


class OutOfMemoryError(RuntimeError):
    """As torch's, which is told by its name."""


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("such and such"), 2, "error: such and such"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OutOfMemoryError("CUDA out of memory. Tried"), 2, "--model.gradient_checkpointing true"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "no space left on the disk for runs/x",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 2, "no space left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "/data/x: Permission denied"),
    ],
)
def test_errors_become_a_line_and_a_status(error, status, words, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr(cli, "_dispatch", fail)
    assert main(["train"]) == status
    assert words in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def fail(argv):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(cli, "_dispatch", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])
    assert "diffalign env" in capsys.readouterr().err
