"""The results as a table for a paper: LaTeX (booktabs), Markdown or CSV, made of what report.json holds."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffalign.evaluation.report.numbers import decimals, fixed
from diffalign.utils.intervals import Estimate

_HEAD = ("Model", "Reward", "Base", "Aligned", "Gain", "95 % interval", "Win rate", "95 % interval", "p")


def paper_table(data: Mapping[str, Any], kind: str) -> str:
    """Return the table of ``report.contest_data``; ``kind`` is one of ``TABLES``.

    A row is a model and a reward, the best model first; p-values are corrected as the report says. Training
    runs of one recipe (``evaluate --runs``) have a row a reward over all runs before their own. LaTeX and
    Markdown have decimals by the width of the interval, CSV all of them.
    """
    return TABLES[kind](data)


def _latex(data: Mapping[str, Any]) -> str:
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in [_HEAD, *_rows(data)]]
    body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
    return "\n".join([r"\begin{tabular}{ll" + "r" * (len(_HEAD) - 2) + "}", *body, r"\end{tabular}"])


def _markdown(data: Mapping[str, Any]) -> str:
    lines = [_HEAD, ("---", "---", *["---:"] * (len(_HEAD) - 2)), *_rows(data)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in lines)


def _csv(data: Mapping[str, Any]) -> str:
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(
        ["model", "reward", "base", "aligned", "gain", "gain_low", "gain_high", "win_rate", "win_rate_low",
         "win_rate_high", "p_value_adjusted", "prompts"]
    )  # fmt: skip
    for model, reward, found in _found(data):
        p = found.get("p_value_adjusted", "")
        out.writerow(
            [model, reward, found.get("base", ""), found.get("aligned", ""), found["gain"],
             *found["gain_ci95"], found["win_rate"], *found["win_rate_ci95"], p, data["prompts"]]
        )  # fmt: skip
    return file.getvalue().rstrip("\n")


TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "latex": _latex,
    "markdown": _markdown,
    "csv": _csv,
}


def _found(data: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """Return (model, reward, numbers), training runs together first."""
    found = [
        (f"mean of {numbers['runs']} runs", reward, numbers)
        for reward, numbers in data.get("over_runs", {}).items()
    ]
    models = data["models"]
    for model in sorted(models, key=lambda name: -models[name]["gain"]):
        found += [(model, reward, numbers) for reward, numbers in models[model]["rewards"].items()]
    return found


def _rows(data: Mapping[str, Any]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = []
    for model, reward, numbers in _found(data):
        gain = Estimate(numbers["gain"], *numbers["gain_ci95"])
        places = decimals(gain)
        share = Estimate(numbers["win_rate"], *numbers["win_rate_ci95"])
        p = numbers.get("p_value_adjusted")
        rows.append(
            (
                model,
                reward,
                *(fixed(numbers[side], places) if side in numbers else "" for side in ("base", "aligned")),
                fixed(gain.value, places, True),
                f"{fixed(gain.low, places, True)} to {fixed(gain.high, places, True)}",
                f"{share.value:.1%}",
                f"{share.low:.1%} to {share.high:.1%}",
                "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
            )
        )
    return rows


def _escaped(text: str) -> str:
    """Return a cell as LaTeX."""
    for mark in ("&", "%", "_", "#", "$"):
        text = text.replace(mark, "\\" + mark)
    return text.replace("\N{MINUS SIGN}", "$-$").replace("<", "$<$")
