"""People's blind comparisons of base and aligned models, in the report: ``diffalign label EVALUATION``."""

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.contest import BASE
from diffalign.evaluation.drawing.samples import read_samples
from diffalign.evaluation.measuring.statistics import Comparison, compare
from diffalign.evaluation.report.numbers import p_value, percent
from diffalign.evaluation.report.page import section, table
from diffalign.utils.text import json_lines

logger = logging.getLogger(__name__)

FILES = "people/**/blind.jsonl"


def read_people(folder: Path) -> dict[str, Comparison]:
    """Return people's comparison of each model with the base, by the model's folder.

    Comparisons of images that the evaluation no longer has, such as those of a model that was trained
    further, are left out and told.

    Args:
        folder: of an evaluation; without comparisons the result is empty.

    Raises:
        UserError: a line that is not JSON, or no comparison.
    """
    rows: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    names: dict[str, set[str]] = {}
    for file in sorted(folder.glob(FILES)):
        read, old = list(json_lines(file)), 0
        for where, row in read:
            model, found, images = _parsed(where, row)
            for one in {BASE, model} - names.keys():
                names[one] = _names(folder / "images" / one)
            if len(images) == 2 and images[0] in names[BASE] and images[1] in names[model]:
                rows[model].append(found)
            else:
                old += 1
        if old:
            logger.warning(
                "%s: %d of %d comparisons are left out, of images that %s no longer has",
                file, old, len(read), folder / "images",
            )  # fmt: skip
    return {model: compare(*map(list, zip(*some, strict=True))) for model, some in rows.items()}  # type: ignore[arg-type]


def _parsed(where: str, row: Mapping[str, Any]) -> tuple[str, tuple[float, float, str], tuple[str, ...]]:
    """Return (model, (score of the base, of the aligned model, prompt), names of both images) of a line."""
    try:
        found = float(row["base"]), float(row["aligned"]), str(row["prompt"])
        return str(row["model"]), found, tuple(map(str, row.get("images", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is no comparison of `diffalign label`: {error!r}") from error


def _names(folder: Path) -> set[str]:
    """Return the names of a model's newest images."""
    if not any(folder.glob("manifest*.jsonl")):
        return set()
    return {sample.source.name for sample in read_samples(folder) if isinstance(sample.source, Path)}


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
