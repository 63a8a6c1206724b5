"""What the leaderboard says, for the decision guide: the best method of a table, and those not behind it."""

from collections.abc import Sequence
from itertools import groupby

from benchmarks import methods
from benchmarks.record import Row, between, over_seeds, shown
from benchmarks.tables import TITLES, kind_of
from diffalign.evaluation.measuring.statistics import holm

LEAST = 3  # seeds of a method, and methods of a group, that are compared
LEVEL = 0.05
ABOUT = (
    "From the rows of the [leaderboard](../../benchmarks/methods.md), at equal compute within a line, on "
    "tiny models: gains of the judge with 95 % intervals over prompts and seeds. *Not behind it*: methods "
    "whose difference to the first is not shown (two-sided, Holm's correction within the line, 0.05). "
    "Methods with fewer than three seeds are left out. Lines of recipes' settings compare tuning as much as "
    "methods."
)


def lines() -> list[str]:
    """Return the section of the guide."""
    return of_rows(methods.current())


def of_rows(rows: Sequence[Row]) -> list[str]:
    """Return the section for some rows of the leaderboard."""
    found = [
        "## What the leaderboard says",
        "",
        ABOUT,
        "",
        "| model, source of data | settings | first | not behind it | `dpo` | `sft` |",
        "|---|---|---|---|---|---|",
    ]
    chosen = sorted((row for row in rows if row["world"] != "plane"), key=_place)
    for (world, kind, shipped), group in groupby(chosen, key=_place):
        gains = {
            name: [row["gains"] for row in seeds]
            for name, seeds in groupby(group, key=lambda row: row["method"])
        }
        gains = {_name(name): table for name, table in gains.items() if len(table) >= LEAST}
        if len(gains) >= LEAST:
            settings = "the recipes'" if shipped else "tuned alike"
            found.append(f"| {list(TITLES.values())[world]}, {kind} | {settings} | {_first(gains)} |")
    return [*found, ""]


def _place(row: Row) -> tuple[int, str, bool]:
    return list(TITLES).index(row["world"]), kind_of(row), "trials" not in row


def _name(method: str) -> str:
    return f"`{method}`"


def _first(gains: dict[str, list[list[float]]]) -> str:
    """Return the cells of a line: the first method, those not behind it, and the gains of two references."""
    names = sorted(gains, key=lambda name: -over_seeds(gains[name]).value)
    adjusted = holm([between(gains[names[0]], gains[name])[1] for name in names[1:]])
    equal = [name for name, p in zip(names[1:], adjusted, strict=True) if p > LEVEL]
    cells = [f"{names[0]} {shown(over_seeds(gains[names[0]]))}", ", ".join(equal) or "none"]
    cells += [
        shown(over_seeds(gains[key])) if (key := _name(name)) in gains else "" for name in ("dpo", "sft")
    ]
    return " | ".join(cells)
