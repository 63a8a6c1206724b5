"""The scores by prompt: for programs (parquet, a row a model and prompt) and for people (json lines)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.evaluation.contest import BASE, Contest
from diffalign.evaluation.evaluate import PromptRow
from diffalign.rewards.scoring.score import write_table
from diffalign.utils.files import write_atomic


def write_tables(folder: Path, contest: Contest) -> None:
    """Write scores.parquet and scores.jsonl into ``folder``.

    The parquet file has a row for every model, the base among them, and prompt: ``model``, ``prompt``, a
    column ``category_AXIS`` for each axis of categories, ``images`` (how many the means are over),
    ``score_REWARD``. The json lines have an object a prompt with the scores of ``base`` and ``aligned``, or
    of several ``models`` by name.
    """
    categories = _categories(contest)
    rows: list[dict[str, Any]] = []
    sides = [(BASE, row, row.base) for row in contest.leading.rows]
    sides += [(name, row, row.aligned) for name, e in contest.evaluations.items() for row in e.rows]
    for model, row, scores in sides:
        own = {f"category_{axis}": value for axis, value in categories[row.prompt].items()}
        named = {f"score_{reward}": value for reward, value in scores.items()}
        rows.append({"model": model, "prompt": row.prompt, **own, "images": row.images, **named})
    write_table(rows, folder / "scores.parquet")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _by_prompt(contest, categories))
    write_atomic(folder / "scores.jsonl", lines)


def _by_prompt(contest: Contest, categories: Mapping[str, Mapping[str, str]]) -> list[dict[str, Any]]:
    rows = []
    tables: list[tuple[PromptRow, ...]] = [e.rows for e in contest.evaluations.values()]
    for one, *others in zip(*tables, strict=True):
        row: dict[str, Any] = {"prompt": one.prompt, "images": one.images}
        if contest.categories:
            row["categories"] = dict(categories[one.prompt])
        row["base"] = dict(one.base)
        if others:
            named = zip(contest.names, [one, *others], strict=True)
            row["models"] = {name: dict(table.aligned) for name, table in named}
        else:
            row["aligned"] = dict(one.aligned)
        rows.append(row)
    return rows


def _categories(contest: Contest) -> dict[str, dict[str, str]]:
    """By prompt and axis; of a prompt that was given twice the first ones."""
    found: dict[str, dict[str, str]] = {}
    for i, prompt in enumerate(contest.leading.prompts):
        found.setdefault(prompt, {axis: values[i] for axis, values in contest.categories.items()})
    return found
