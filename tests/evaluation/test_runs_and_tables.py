"""Training runs of one recipe together, and tables for papers."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from diffalign.cli import main
from diffalign.evaluation.contest import contest
from diffalign.evaluation.evaluate import evaluate
from diffalign.evaluation.measuring.statistics import bootstrap_mean, two_level_bootstrap
from diffalign.evaluation.report.paper import paper_table
from diffalign.evaluation.report.report import RunFacts, contest_data, render
from diffalign.evaluation.report.sections import verdict
from tests.evaluation.fakes import brightness
from tests.evaluation.test_evaluate_report import PROMPTS, shades


def runs(*levels, repeats=True):
    images = {f"run_{i}": shades(level) for i, level in enumerate(levels)}
    base = shades(100)
    rewards = {"light_100%": brightness}
    found = {
        name: evaluate(base, own, PROMPTS, rewards, resamples=300, progress=False)
        for name, own in images.items()
    }
    return replace(contest(base, images, found), repeats=repeats)


def data_of(found):
    return contest_data(found, {name: RunFacts("dpo") for name in found.names})


def test_one_run_has_the_interval_of_its_prompts():
    values = np.random.default_rng(0).normal(1, 2, 50)
    one, both = bootstrap_mean(values), two_level_bootstrap([values])
    assert both.value == pytest.approx(one.value)
    assert both.low == pytest.approx(one.low, abs=0.05) and both.high == pytest.approx(one.high, abs=0.05)


def test_its_width_is_that_of_runs_and_prompts():
    """Additive effects of S runs and P prompts: the variance of the mean is a^2 / S + b^2 / P."""
    random = np.random.default_rng(1)
    run, prompt = random.normal(0, 0.3, 40), random.normal(0, 1.0, 200)
    run, prompt = 0.3 * (run - run.mean()) / run.std(), (prompt - prompt.mean()) / prompt.std()
    found = two_level_bootstrap(0.5 + run[:, None] + prompt[None, :], resamples=4000)
    half = 1.96 * np.sqrt(0.3**2 / 40 + 1 / 200)
    assert found.value == pytest.approx(0.5)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found == two_level_bootstrap(0.5 + run[:, None] + prompt[None, :], resamples=4000)


@pytest.mark.parametrize("values", [[], [1.0, 2.0], np.zeros((0, 3))])
def test_anything_but_a_table_is_refused(values):
    with pytest.raises(ValueError, match="runs by prompts"):
        two_level_bootstrap(values)


def test_runs_together():
    found = runs(110, 120, 100)
    result = found.over_runs["light_100%"]
    assert result.gains == pytest.approx((10, 20, 0)) and result.gain.value == pytest.approx(10)
    assert result.gain.low == pytest.approx(0, abs=1e-6), (
        "all three draws may be of the run that gained nothing"
    )
    headline, support = verdict(found)
    assert headline == "Over 3 training runs no difference is shown."
    assert "fewer than 5 runs is too narrow" in support
    better = runs(110, 111, 112, 110, 111)
    assert verdict(better)[0] == "Over 5 training runs the aligned model is better."
    assert "too narrow" not in verdict(better)[1]
    assert verdict(runs(90, 91, 92))[0] == "Over 3 training runs the aligned model is worse."
    assert runs(110, 120, repeats=False).over_runs == {} and "over_runs" not in data_of(
        runs(110, 120, repeats=False)
    )
    assert "Over 3 training runs" in render(found, {name: RunFacts("dpo") for name in found.names})


def test_csv_has_every_digit():
    data = data_of(runs(110, 120))
    rows = list(csv.DictReader(io.StringIO(paper_table(data, "csv"))))
    assert [row["model"] for row in rows] == ["mean of 2 runs", "run_1", "run_0"]
    assert float(rows[1]["gain"]) == data["models"]["run_1"]["gain"] and rows[0]["base"] == ""
    assert float(rows[0]["gain"]) == data["over_runs"]["light_100%"]["gain"]


def test_latex_is_escaped_and_whole():
    text = paper_table(data_of(runs(110, 90)), "latex")
    lines = text.split("\n")
    assert lines[0].startswith(r"\begin{tabular}{ll") and lines[-1] == r"\end{tabular}"
    assert r"light\_100\%" in text and r"run\_0" in text and "$-$10" in text
    columns = {line.count("&") - line.count(r"\&") for line in lines if line.endswith(r"\\")}
    assert columns == {8}


def test_markdown_has_a_row_a_model_and_reward():
    lines = paper_table(data_of(runs(110, 90, repeats=False)), "markdown").split("\n")
    assert len(lines) == 4 and all(line.count("|") == 10 for line in lines)
    assert lines[2].startswith("| run_0 | light_100% |")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runs", "a"], "two or more run directories"),
        (["--runs", "a,b", "--base", "x"], "leave --run, --base and --aligned out"),
    ],
)
def test_bad_runs(arguments, words, capsys):
    assert main(["evaluate", *arguments, "--prompts", "tiny:test", "--rewards", "judge"]) == 2
    assert words in capsys.readouterr().err
