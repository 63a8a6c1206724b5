"""The report's sections on training: curves by step, and held-out metrics by time.

Reads the rows of metrics.jsonl by their logged names: ``loss``, ``rewards/accuracies``,
``rewards/margins``, ``errors/chosen``, ``errors/rejected``; held out ``heldout/<name>``, and
``heldout/<low>-<high>/<name>`` for the pairs noised to times between low and high.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffalign.evaluation.report.charts import Line, line_chart
from diffalign.evaluation.report.page import legend, section, stack

Rows = Sequence[Mapping[str, Any]]

_BIN = re.compile(r"heldout/([0-9.]+)-([0-9.]+)/(.+)")


class _Curve(NamedTuple):
    title: str
    keys: tuple[tuple[str, str, str], ...]  # name, CSS class, label
    level: float | None


_TRAINING = (
    _Curve("Loss", (("loss", "aligned", ""),), None),
    _Curve(
        "Implicit accuracy",
        (("heldout/rewards/accuracies", "base", "held out"), ("rewards/accuracies", "aligned", "training")),
        0.5,
    ),
    _Curve(
        "Margin",
        (("heldout/rewards/margins", "base", "held out"), ("rewards/margins", "aligned", "training")),
        0.0,
    ),
    _Curve(
        "Error against the reference",
        (("errors/rejected", "base", "loser"), ("errors/chosen", "aligned", "winner")),
        0.0,
    ),
    _Curve("Gradient norm", (("grad_norm", "aligned", ""),), None),
    _Curve("Learning rate", (("learning_rate", "aligned", ""),), None),
)
_HELD_OUT = (
    _Curve("Accuracy by time", (("rewards/accuracies", "aligned", ""),), 0.5),
    _Curve("Margin by time", (("rewards/margins", "aligned", ""),), 0.0),
    _Curve(
        "Error against the reference by time",
        (("errors/rejected", "base", "loser"), ("errors/chosen", "aligned", "winner")),
        0.0,
    ),
)


def training(metrics: Mapping[str, Rows]) -> str:
    """Return curves of the existing metrics over optimizer steps, by model; empty if there are none."""
    lead = "By optimizer step. An error below zero: the policy predicts the noise better than the reference; "
    lead += "a preference is learnt when the loser's rises above the winner's."
    bodies = {
        name: _cards(
            _TRAINING, [(float(row["step"]), row) for row in rows if "step" in row], "optimizer step"
        )
        for name, rows in metrics.items()
    }
    return _section("Training", lead, bodies)


def held_out(metrics: Mapping[str, Rows]) -> str:
    """Return the last held-out measurement by time, by model; empty if there is none."""
    lead = "On pairs never trained on, at the last measured step, by the time that images were noised to: "
    lead += "0 is the clean image, where details are decided; 1 is noise, where the layout is."
    bodies = {
        name: _cards(_HELD_OUT, _bins(rows), "time (0 image, 1 noise)") for name, rows in metrics.items()
    }
    return _section("Held-out pairs", lead, bodies)


def _bins(metrics: Rows) -> list[tuple[float, Mapping[str, Any]]]:
    """Return the last measurement by the middle of each bin of times."""
    measured = [row for row in metrics if any(_BIN.fullmatch(key) for key in row)]
    bins: dict[float, dict[str, Any]] = {}
    for key, value in measured[-1].items() if measured else ():
        match = _BIN.fullmatch(key)
        if match:
            middle = (float(match[1]) + float(match[2])) / 2
            bins.setdefault(middle, {})[match[3]] = value
    return sorted(bins.items())


def _section(title: str, lead: str, bodies: Mapping[str, str]) -> str:
    if not any(bodies.values()):
        return ""
    none = '<p class="soft">Nothing is known of the training of this model.</p>'
    return section(title, lead, stack({name: body or none for name, body in bodies.items()}))


def _cards(curves: Sequence[_Curve], points: Sequence[tuple[float, Mapping[str, Any]]], x: str) -> str:
    cards = []
    for curve in curves:
        lines = []
        for key, kind, label in curve.keys:
            known = [(place, row[key]) for place, row in points if isinstance(row.get(key), int | float)]
            if known:
                lines.append(Line(label, kind, [place for place, _ in known], [float(y) for _, y in known]))
        if lines:
            words = legend(lines[0].label, lines[1].label) if len(lines) == 2 else ""
            chart = line_chart(curve.title, lines, curve.level, curve.title != "Learning rate", (x, ""))
            cards.append(f'<div class="card"><h3>{curve.title}</h3>{chart}{words}</div>')
    return f'<div class="charts">{"".join(cards)}</div>' if cards else ""
