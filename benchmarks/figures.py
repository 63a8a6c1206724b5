"""Make the figures of README and site from recorded rows, from the plane and from the tiny models.

    python -m benchmarks.figures                 # missing figures whose data exist
    python -m benchmarks.figures --only ranks    # one figure, replacing its file

Writes to ``docs/figures``: ``ranks`` (gain of every method with its interval), ``compute`` (gain against
processor seconds), ``cost`` (gain against compute over the training of each method), ``sensitivity`` (gain of
every trial against its setting), ``over_optimisation`` (gain of trained and held-out rewards over training)
and ``time_accuracy`` (accuracy on held-out pairs of the plane by time) as SVG and PNG; ``reward_likes.png``,
out of the notebook; ``plane_METHOD.png``: sample densities of the base, the aligned model and the optimum of
the same mean reward; and ``tiny_METHOD.png`` or ``sd3_METHOD.png``: images of the base and of the aligned
model from the same noise.
"""

import argparse
import io
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import (
    figures_samples,
    figures_training,
    methods,
    over_optimisation,
    record,
    time_accuracy,
    tiny_world,
    tuning,
)
from benchmarks.record import Row, over_seeds
from benchmarks.tables import TITLES
from diffalign.methods import REGISTRY
from diffalign.plane.settings import PLANE_METHODS
from diffalign.utils.files import write_atomic

FOLDER = record.HERE.parent / "docs" / "figures"
SAMPLED = ("tiny", "sd3")  # worlds whose methods have a figure of images; a method has one of the first
STYLE = {
    "font.size": 9,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "diffalign",  # the same file each time
    "svg.fonttype": "none",
}


def ranks(rows: Sequence[Row]) -> Figure:
    """Plot the gain of every method on the tiny image models with its 95 % interval, best first."""
    tables = list(_tables(rows))
    sizes = [len(table) for _, table in tables]
    figure, axes = plt.subplots(
        len(tables),
        figsize=(6.4, 0.17 * sum(sizes) + 0.75 * len(tables)),
        height_ratios=sizes,
        layout="constrained",
        squeeze=False,
    )
    for axis, (title, table) in zip(axes[:, 0], tables, strict=True):
        gains = sorted(((over_seeds(gains), name) for name, gains in table), key=lambda item: item[0].value)
        for place, (gain, _) in enumerate(gains):
            colour = "C0" if gain.low > 0 else "C3" if gain.high < 0 else "0.55"
            axis.plot([gain.low, gain.high], [place, place], color=colour, lw=3, alpha=0.4)
            axis.plot(gain.value, place, "o", color=colour, ms=4)
        axis.set_yticks(range(len(gains)), [name for _, name in gains], fontsize=7)
        axis.axvline(0, color="0.7", lw=1, zorder=0)
        axis.set_title(title, fontsize=9, loc="left")
        axis.margins(y=0.04)
    axes[-1, 0].set_xlabel("gain of the judge over the base, 95 % interval over prompts and seeds")
    return figure


def compute(rows: Sequence[Row]) -> Figure:
    """Plot the gain of every method on the tiny image models against its processor seconds."""
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for colour, (title, world_rows) in enumerate(_worlds(rows)):
        at, gains, names = [], [], []
        for (name, tuned), group in groupby(world_rows, key=lambda row: (row["method"], "trials" in row)):
            seeds = list(group)
            at.append(np.mean([row["seconds"] for row in seeds]))
            gains.append(over_seeds([row["gains"] for row in seeds]))
            names.append(f"{name}{' *' if tuned else ''}")
        values = np.array([g.value for g in gains])
        bars = np.array([[g.value - g.low for g in gains], [g.high - g.value for g in gains]])
        axis.errorbar(at, values, bars, fmt="o", ms=4, lw=1, alpha=0.8, label=title, color=f"C{colour}")
        for x, y, name in zip(at, values, names, strict=True):
            near = (abs(np.log(np.array(at) / x)) < 0.12) & (abs(values - y) < 0.006)
            if near.sum() > 1:  # the labels would overlap
                continue
            axis.annotate(name, (x, y), xytext=(3, 2), textcoords="offset points", fontsize=6, color="0.35")
    axis.set_xscale("log")
    axis.set_xticks(ticks := [30, 50, 100, 200, 400], [str(tick) for tick in ticks])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="processor seconds of training", ylabel="gain of the judge")
    axis.axhline(0, color="0.7", lw=1, zorder=0)
    axis.legend(frameon=False, fontsize=7, loc="lower right")
    return figure


def sensitivity(trials: Sequence[tuning.Trial]) -> Figure:
    """Plot the gain of every trial on validation prompts: by strength, and by learning rate."""
    trials = sorted(trials, key=lambda t: (t["world"], t["method"]))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    groups = groupby(trials, key=lambda t: (t["world"], t["method"]))
    for number, ((world, method), group) in enumerate(groups):
        for axis, curve in zip(axes, tuning.curves(list(group)), strict=True):
            if curve:
                axis.plot(
                    *zip(*curve, strict=True),
                    ("o-", "s--", "^:")[number // 10 % 3],  # ten colours, then another line
                    ms=3,
                    color=f"C{number % 10}",
                    label=f"{method} ({world})",
                )
    for axis, name in zip(axes, ("strength", "learning rate"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"{name}, as a multiple of the recipe's")
        axis.axhline(0, color="0.7", lw=1, zorder=0)
    axes[0].set_ylabel("gain of the judge, validation prompts")
    axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _worlds(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield title and rows of each tiny image model, offline and online methods separately."""
    for world in TITLES:
        for online in (False, True):
            selected = [r for r in rows if r["world"] == world and ("rollout" in r["asked"]) == online]
            if selected and world != "plane":
                yield f"{TITLES[world]}{', online' if online else ''}", selected


def _tables(rows: Sequence[Row]) -> Iterator[tuple[str, list[tuple[str, list[list[float]]]]]]:
    for title, world_rows in _worlds(rows):
        by_method = groupby(world_rows, key=lambda row: (row["method"], "trials" in row))
        yield (
            title,
            [
                (f"{name}{' *' if tuned else ''}", [row["gains"] for row in group])
                for (name, tuned), group in by_method
            ],
        )


def save(name: str, figure: Figure) -> None:
    """Write a figure as SVG and PNG."""
    for kind in ("svg", "png"):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
        write_atomic(FOLDER / f"{name}.{kind}", drawn.getvalue())
    plt.close(figure)


def jobs() -> dict[str, Any]:
    """Return what makes each figure whose data exist, by name."""
    rows = methods.current()
    found: dict[str, Any] = {
        "ranks": lambda: save("ranks", ranks(rows)),
        "compute": lambda: save("compute", compute(rows)),
        "time_accuracy": lambda: save("time_accuracy", time_accuracy.figure()),
        "reward_likes": lambda: write_atomic(
            FOLDER / "reward_likes.png", figures_samples.of_notebook("what_a_reward_likes", 1)
        ),
    }
    if trials := tuning.first_trials():
        found["sensitivity"] = lambda: save("sensitivity", sensitivity(trials))
    if trained := over_optimisation.current():
        start = over_optimisation.base(over_optimisation.PROMPTS)
        found["over_optimisation"] = lambda: save(
            "over_optimisation", figures_training.rewards(start, trained)
        )
        found["cost"] = lambda: save("cost", figures_training.cost(start, trained))
    for method, row in PLANE_METHODS.items():
        file = FOLDER / f"plane_{method}.png"
        found[file.stem] = lambda file=file, row=row: write_atomic(file, figures_samples.plane(row))
    sampled = {method: world for world in reversed(SAMPLED) for method in tiny_world.names(world)}
    for method in sorted(sampled.keys() & REGISTRY.keys()):  # others are losses or settings of one of them
        world = sampled[method]
        file = FOLDER / f"{world}_{method}.png"
        found[file.stem] = lambda file=file, method=method, world=world: write_atomic(
            file, figures_samples.images(world, method)
        )
    return found


def main(argv: list[str] | None = None) -> None:
    """Make the requested figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="A,B", help="names of figures; made again")
    only = parser.parse_args(argv).only
    matplotlib.use("agg")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    every = jobs()
    chosen = only.split(",") if only else [n for n in every if not (FOLDER / f"{n}.png").exists()]
    if unknown := [name for name in chosen if name not in every]:
        raise SystemExit(f"--only {','.join(unknown)}: no such figure; allowed: {', '.join(every)}")
    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in chosen:
            every[name]()
            print(name, flush=True)


if __name__ == "__main__":
    main()
