"""Figures of gains over training: rewards of each method, and what compute buys."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from benchmarks import over_optimisation_page
from benchmarks.record import Row, over_seeds
from benchmarks.tiny_world import ONLINE_BUDGET

TRAINED: dict[str, Any] = {"ls": "-", "lw": 2.2, "marker": "o", "ms": 4}
HELD_OUT: dict[str, Any] = {"ls": "--", "lw": 1, "marker": "o", "ms": 2.5}
ONLINE = "online and reward gradients"
OFFLINE = "from the judge's pairs or likes"


def cost(start: Row, rows: Sequence[Row]) -> Figure:
    """Plot the judge's gain of every arm against compute, in thousands of forward-equivalents."""
    panels: dict[str, list[tuple[Any, Any]]] = {OFFLINE: [], ONLINE: []}
    for arm in over_optimisation_page.ARMS:
        if points := over_optimisation_page.course_of(arm, rows):
            online = "rollout" in points[0][0]["asked"]
            panels[ONLINE if online else OFFLINE].append((arm, points))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        for number, (arm, points) in enumerate(arms):
            at = [seeds[0]["compute"] * ONLINE_BUDGET / 1000 for seeds in points]
            table = over_optimisation_page.curve(start, points, over_optimisation_page.JUDGE)[1:]
            line = {"marker": "o", "ms": 3, "color": f"C{number}", "label": arm.name}
            _with_interval(axis, at, table, line, shade=0.08)
        axis.set_title(title, fontsize=9, loc="left")
        axis.set(xscale="log", xlabel="thousands of forward-equivalents")
        fractions = [fraction * ONLINE_BUDGET / 1000 for fraction in over_optimisation_page.FRACTIONS]
        axis.set_xticks(fractions, [f"{value:.0f}" for value in fractions])
        axis.minorticks_off()
        axis.axhline(0, color="0.7", lw=1, zorder=0)
        axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.17))
    axes[0].set_ylabel("gain of the judge")
    return figure


def _with_interval(
    axis: Axes, at: Sequence[float], gains: NDArray[np.float64], line: dict[str, Any], shade: float
) -> None:
    """Plot mean gains (points, seeds, prompts) with their 95 % intervals, in the style of a line."""
    means = [over_seeds(table) for table in gains]
    axis.plot(at, [mean.value for mean in means], **line)
    low, high = ([getattr(mean, end) for mean in means] for end in ("low", "high"))
    axis.fill_between(at, low, high, color=line["color"], alpha=shade, lw=0)


def rewards(start: Row, rows: Sequence[Row]) -> Figure:
    """Plot the gains of every arm over its training: the trained reward thick, held-out ones dashed.

    Gains are in standard deviations of the base's scores over prompts, so that the rewards compare.
    """
    arms = {
        arm: points
        for arm in over_optimisation_page.ARMS
        if (points := over_optimisation_page.course_of(arm, rows))
    }
    lines = -(-len(arms) // 3)
    figure, grid = plt.subplots(
        lines, 3, figsize=(7.6, 2.3 * lines), layout="constrained", sharey=True, squeeze=False
    )
    end = max(seeds[0]["compute"] for points in arms.values() for seeds in points)
    for axis, (arm, points) in zip(grid.flat, arms.items(), strict=False):
        at = [0.0, *(seeds[0]["compute"] for seeds in points)]
        for name, line in _lines(arm.trained).items():
            gains = over_optimisation_page.curve(start, points, name) / np.std(start["scores"][name])
            _with_interval(axis, at, gains, line, shade=0.12)
        axis.axhline(0, color="0.7", lw=1, zorder=0)
        count = len(points[0])
        axis.set_title(f"{arm.name}, {count} seed{'s' * (count > 1)}", fontsize=9, loc="left")
        axis.set(xlabel="compute", xlim=(0, 1.05 * end))
    for axis in grid[:, 0]:
        axis.set_ylabel("gain / sd of the base")
    for axis in grid.flat[len(arms) :]:
        axis.set_axis_off()
    colours = {
        over_optimisation_page.TITLES[name]: {"color": line["color"]} for name, line in _lines("").items()
    }
    kinds = {"trained on": TRAINED | {"color": "0.3"}, "held out": HELD_OUT | {"color": "0.3"}}
    handles = [Line2D([], [], label=label, **line) for label, line in (colours | kinds).items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, ncols=6, loc="outside lower center")
    return figure


def _lines(trained: str) -> dict[str, dict[str, Any]]:
    """Return the style of each reward's line."""
    return {
        name: (TRAINED if name == trained else HELD_OUT) | {"color": f"C{number}"}
        for number, name in enumerate(over_optimisation_page.MEASURED)
    }
