"""Help texts and cards: every option has a help text, no line is empty, counts agree with nouns."""

import argparse
import importlib

import pytest

from diffalign.cli import COMMANDS, main
from diffalign.cli.common import count, names, number, side
from diffalign.cli.evaluate import summary
from diffalign.errors import UserError

OWN_READING = {"train", "train-reward", "cache", "estimate"}  # whose options are the fields of the tree


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - OWN_READING))
def test_every_option_of_a_command_has_a_help_text(command, monkeypatch):
    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    with pytest.raises(Found) as caught:
        importlib.import_module(f"diffalign.cli.{command.replace('-', '_')}").run([])
    parser = caught.value.args[0]
    assert [a.dest for a in parser._actions if not a.help] == []


@pytest.mark.parametrize("name", ["sdxl", "sd3", "wan"])
def test_a_model_family_is_described(name, capsys):
    assert main(["models", name]) == 0
    text = capsys.readouterr().out
    first = {"sdxl": "sdxl_dpo_lora_12gb", "sd3": "sd3_dpo", "wan": "wan_dpo_lora_16gb"}[name]
    assert f"({name})" in text and f"diffalign train {first} --data.path" in text
    assert f"diffalign estimate {first} --fits 24" in text and "flux_kontext" not in text
    assert main(["models", "sdxx"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["judge", "pickscore", "ensemble"])
def test_a_reward_is_described_without_empty_lines(name, capsys):
    assert main(["rewards", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.rstrip().endswith(":") or line.endswith("()")] == []


def test_a_name_of_a_method_and_of_a_strategy_is_listed_once(capsys):
    assert main(["methods", "sfx"]) == 2
    assert capsys.readouterr().err.count("sft,") == 1


def test_a_count_agrees_with_its_noun():
    assert [count(n, "image") for n in (0, 1, 2, 1234)] == ["0 images", "1 image", "2 images", "1,234 images"]


@pytest.mark.parametrize("text", ["inf", "nan", "-1", "x", "1e999", "9" * 5000])
def test_a_number_is_finite(text):
    for kind in (int, float):
        with pytest.raises(argparse.ArgumentTypeError, match="allowed: 0 or more"):
            number(kind, 0)(text)


def test_a_side_is_a_multiple_of_8():
    assert side("64") == 64
    with pytest.raises(argparse.ArgumentTypeError, match="33 is no multiple of 8; allowed: one, such as 32"):
        side("33")


def test_a_name_is_given_once():
    assert names("a, b,", "--rewards") == ["a", "b"]
    with pytest.raises(UserError, match="--rewards 'a,b,a' has 'a' twice"):
        names("a,b,a", "--rewards")


@pytest.mark.parametrize(
    "flag", [["--tflops", "nan"], ["--tflops=0"], ["--utilisation", "1.5"], ["--tflops=inf"]]
)
def test_a_speed_is_a_number_above_0(flag, capsys):
    assert main(["estimate", "tiny_sdxl_dpo", *flag]) == 2
    assert "allowed: " in capsys.readouterr().err


def test_the_environment_is_told_where_the_system_has_no_sysconf(monkeypatch):
    from diffalign.cli.env import environment

    for name in ("sysconf", "sysconf_names", "sched_getaffinity"):  # Windows has none of them
        monkeypatch.delattr(f"os.{name}", raising=False)
    facts = environment()
    assert facts["memory"] == "unknown" and facts["cores"]


@pytest.mark.parametrize(
    ("path", "words"),
    [("a" * 300, "too long"), ("~nosuchuser/a.yaml", "no home folder"), ("a\0b", "null byte")],
)
def test_names_that_no_file_can_have_are_an_error(path, words, capsys):
    assert main(["train", path]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "tiny:sd15", "--prompts", "tiny:test"],
        ["edit", "tiny:sd15", "--from", "a", "--to", "b", "--no-report"],
    ],
)
def test_a_base_that_would_be_ignored_is_refused(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*argv, "--base", "tiny:sdxl"]) == 2
    assert "--base 'tiny:sdxl' is for a LoRA or a network alone, and 'tiny:sd15'" in capsys.readouterr().err


def test_half_a_size_of_an_edits_page_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["edit", "tiny:sd15", "--from", "a", "--to", "b", "--height", "64"]) == 2
    assert "--height and --width: one is given" in capsys.readouterr().err


def test_few_prompts_are_told_beside_the_table():
    numbers = {
        "base": 0.0, "aligned": 1.0, "gain": 1.0, "gain_ci95": [1.0, 1.0], "win_rate": 1.0,
        "win_rate_ci95": [0.2, 1.0], "p_value_adjusted": 1.0,
    }  # fmt: skip
    model = {"gain": 1.0, "rewards": {"jpeg": numbers}, "alarm": []}
    text = {n: summary({"models": {"a": model}, "prompts": n, "headline": ""}) for n in (5, 6)}
    assert "too few prompts to tell: an interval of a gain needs at least 6" in text[5]
    assert "too few" not in text[6]
