"""Every command that README, the documentation and the recipes print is parsed as its command parses it."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest

from benchmarks.reproduce import written
from diffalign.cli import COMMANDS, main
from diffalign.config.recipes import recipes

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESOLVED = {"train", "cache", "estimate"}
"""Commands that take the fields of a run: their whole configuration is built and validated."""
OF_ESTIMATE = ("--tflops", "--utilisation", "--fits")


class Parsed(Exception):
    """The arguments were read; nothing else is done."""


def commands_of(text: str) -> list[str]:
    """Return the diffalign commands of a page's fenced blocks, one line each."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.S)
    code = "\n".join(blocks).replace("\\\n", " ")
    return re.findall(r"^\s*(?:[^#\n]*-m )?(diffalign [^#\n]*)", code, re.M)


def tried(command: str) -> int:
    """Return the exit status of a command up to where it would begin to work."""
    command = command.strip()
    if command.count("'") % 2:  # the end of `bash -c '...'`
        command = command.removesuffix("'")
    name, *words = shlex.split(command)[1:]
    assert name in COMMANDS, command
    if name in RESOLVED:
        while found := next((word for word in words if word in OF_ESTIMATE), None):
            at = words.index(found)
            assert float(words[at + 1]) > 0
            del words[at : at + 2]
        words = [word for word in words if word != "--json"]
        if words and (words[0].isupper() or words[0].startswith("runs/")):
            words[0] = "tiny_sdxl_dpo"  # CONFIG, RECIPE, or what a run has left
        return main(["train", *words, "--print-config"])
    if name == "train-reward":
        return main([name, *words, "--print-config"])
    return main([name, *words])


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    real = argparse.ArgumentParser.parse_known_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> NoReturn:
        _, extra = real(self, *args, **kwargs)
        raise Parsed(extra)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)


def check(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    unknown: list[str] = []
    try:
        status = tried(command)
    except Parsed as parsed:
        status, unknown = 0, parsed.args[0]
    assert (status, unknown) == (0, []), (command, capsys.readouterr().err)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_are_parsed(page, parse_only, capsys):
    for command in commands_of(page.read_text(encoding="utf-8")):
        check(command, capsys)


def test_commands_of_the_recipes_are_parsed(parse_only, capsys):
    for recipe in recipes():
        printed = re.findall(r"diffalign [^\n]*", "\n".join(recipe.commands).replace("\\\n", " "))
        assert printed, recipe.name
        for command in printed:
            check(command, capsys)


def test_evaluations_of_published_tables_are_parsed(parse_only, capsys):
    for name, entry in written()["recipes"].items():
        check(f"diffalign evaluate --run runs/{name} {entry['evaluate']}", capsys)


def test_a_wrong_command_is_found(parse_only, capsys):
    with pytest.raises(AssertionError, match="trian"):
        check("diffalign trian sdxl_dpo", capsys)
    with pytest.raises(AssertionError, match=r"mean model\.lora\.rank"):
        check("diffalign train sdxl_dpo_lora --model.lora.rnak 4", capsys)
    with pytest.raises(AssertionError):
        check("diffalign evaluate --run runs/a --promts parti", capsys)
