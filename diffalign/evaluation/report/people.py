"""People's blind comparisons of base and aligned models, in the report: ``diffalign label EVALUATION``."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.evaluation.measuring.statistics import Comparison, compare
from diffalign.evaluation.report.numbers import p_value, percent
from diffalign.evaluation.report.page import section, table
from diffalign.utils.text import json_lines

FILE = Path("people", "blind.jsonl")


def read_people(folder: Path) -> dict[str, Comparison]:
    """Return people's comparison of each model with the base, by the model's folder.

    Args:
        folder: of an evaluation; without comparisons the result is empty.

    Raises:
        UserError: a line that is not JSON.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    rows: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for _, row in json_lines(file):
        rows[str(row["model"])].append((float(row["base"]), float(row["aligned"]), str(row["prompt"])))
    return {model: compare(*map(list, zip(*some, strict=True))) for model, some in rows.items()}  # type: ignore[arg-type]


def people_section(people: Mapping[str, Comparison]) -> str:
    """Return the page's section on people's preferences; empty without comparisons."""
    if not people:
        return ""
    rows = [
        [
            name,
            f"{percent(found.win_rate.value)} ({percent(found.win_rate.low)} to "
            f"{percent(found.win_rate.high)})",
            f"{found.wins} / {found.ties} / {found.losses}",
            str(found.prompts),
            p_value(found.p_value),
            found.outcome,
        ]
        for name, found in people.items()
    ]
    lead = "Base against aligned by people, blind: the order is shuffled and the models are not named. "
    lead += "Win rates have 95 % intervals; ties count half."
    columns = ["model", "win rate", "wins / ties / losses", "prompts", "p", "aligned is"]
    return section("By people", lead, table(columns, rows))


def people_data(people: Mapping[str, Comparison]) -> dict[str, dict[str, Any]]:
    """Return people's comparisons for ``report.json``, by model."""
    return {
        name: {
            "win_rate": found.win_rate.value,
            "win_rate_ci95": found.win_rate.interval,
            "win": found.wins,
            "tie": found.ties,
            "loss": found.losses,
            "prompts": found.prompts,
            "p_value": found.p_value,
            "verdict": found.outcome,
        }
        for name, found in people.items()
    }
