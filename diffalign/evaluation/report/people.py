"""People's blind comparisons of base and aligned models, in the report: ``diffalign label EVALUATION``."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from diffalign.evaluation.measuring.statistics import Comparison, compare
from diffalign.utils.text import json_lines

FILE = Path("people", "blind.jsonl")


def read_people(folder: Path) -> dict[str, Comparison]:
    """Return the comparison of each model that people have judged against the base, by the model's folder.

    Args:
        folder: of an evaluation; {} where nobody has judged anything in it.

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


def section(people: Mapping[str, Comparison]) -> str:
    """Return the part of the page that says what people prefer; empty where nobody was asked."""
    if not people:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{percent(found.win_rate.value)} "
        f"<span class=ci>{span(found.win_rate, percent)}</span></td>"
        f"<td>{found.wins} / {found.ties} / {found.losses}</td><td>{found.prompts}</td>"
        f"<td>{found.outcome}</td></tr>"
        for name, found in people.items()
    )
    return (
        "<section id=people><h2>People</h2><p>Base against aligned, blind: order shuffled, the model not named. Win "
        "rate with its 95 % interval, ties counting half.</p><table><thead><tr><th>model</th><th>win rate</th>"
        f"<th>wins / ties / losses</th><th>prompts</th><th></th></tr></thead><tbody>{rows}</tbody></table></section>"
    )
