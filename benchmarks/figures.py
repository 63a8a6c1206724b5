"""Make the figures of README and site from recorded rows and from the plane.

    python -m benchmarks.figures                 # missing figures whose data exist
    python -m benchmarks.figures --only ranks    # one figure, replacing its file

Writes to ``docs/figures``: ``ranks`` (gain of every method with its interval), ``compute`` (gain against
processor seconds), ``sensitivity`` (gain of every trial against its setting) and ``over_optimisation`` (gain
of trained and held-out rewards over training) and ``time_accuracy`` (accuracy on held-out pairs of the plane
by time) as SVG and PNG; ``reward_likes.png``, out of the notebook; and ``plane_METHOD.png``: sample densities
of the base, the aligned model and the optimum of the same mean reward.
"""

import argparse
import base64
import io
import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from PIL import Image

from benchmarks import (
    methods,
    over_optimisation,
    over_optimisation_page,
    plane_world,
    record,
    time_accuracy,
    tuning,
)
from benchmarks.record import Row, over_seeds
from benchmarks.tables import TITLES
from diffalign.plane.plane import LABELS, denoiser_of, points
from diffalign.plane.settings import PLANE_METHODS, PlaneRow
from diffalign.utils.files import write_atomic

FOLDER = record.HERE.parent / "docs" / "figures"
POINTS = 900  # points of each label and panel
EXTENT, BINS = 3.2, 72  # half width of the plotted square, and bins a side
COLOURS = 32  # colours of a density's palette, for small files
TRAINED: dict[str, Any] = {"ls": "-", "lw": 2.2, "marker": "o", "ms": 4}
HELD_OUT: dict[str, Any] = {"ls": "--", "lw": 1, "marker": "o", "ms": 2.5}
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
                    "o-",
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


def over_training(start: Row, rows: Sequence[Row]) -> Figure:
    """Plot the gains of every arm over its training: the trained reward thick, held-out ones dashed.

    Gains are in standard deviations of the base's scores over prompts, so that the rewards compare.
    """
    arms = {
        arm: points
        for arm in over_optimisation_page.ARMS
        if (points := over_optimisation_page.course_of(arm, rows))
    }
    lines = -(-(len(arms) + 1) // 3)  # one panel is the legend's
    figure, grid = plt.subplots(
        lines, 3, figsize=(7.6, 2.3 * lines), layout="constrained", sharey=True, squeeze=False
    )
    end = max(seeds[0]["compute"] for points in arms.values() for seeds in points)
    for axis, (arm, points) in zip(grid.flat, arms.items(), strict=False):
        at = [0.0, *(seeds[0]["compute"] for seeds in points)]
        for name, line in _lines(arm.trained).items():
            gains = over_optimisation_page.curve(start, points, name) / np.std(start["scores"][name])
            means = [over_seeds(table) for table in gains]
            axis.plot(at, [mean.value for mean in means], **line)
            low, high = ([getattr(mean, end) for mean in means] for end in ("low", "high"))
            axis.fill_between(at, low, high, color=line["color"], alpha=0.12, lw=0)
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
    grid.flat[-1].legend(handles=handles, frameon=False, fontsize=8, loc="center")
    return figure


def _lines(trained: str) -> dict[str, dict[str, Any]]:
    """Return the style of each reward's line."""
    return {
        name: (TRAINED if name == trained else HELD_OUT) | {"color": f"C{number}"}
        for number, name in enumerate(over_optimisation_page.MEASURED)
    }


def plane(row: PlaneRow, seed: int = 0) -> bytes:
    """Return a PNG of the densities of the base, the aligned model and the optimum of the same reward.

    The row is trained for as many steps as in the tests, so that methods that overshoot are stopped in time.
    """
    world = plane_world.PLANE
    start = plane_world.base_of(row)
    network = row.trained(start, None if row.rollout else plane_world.drawn(row.data, seed), seed)
    before, after = (points(denoiser_of(n), POINTS, plane_world.NOISE) for n in (start, network))
    draws = torch.Generator().manual_seed(seed)
    best = []
    for label in range(LABELS):
        tau = world.temperature(label, float(world.reward(after[label]).mean()))
        target = world.data(label) if np.isinf(tau) else world.optimum(label, tau)
        best.append(target.points(POINTS, draws))
    panels = {"base": before, "aligned": after, "optimum of the same reward": torch.stack(best)}
    figure, axes = plt.subplots(1, 3, figsize=(6, 2.2), layout="constrained")
    for axis, (title, samples) in zip(axes, panels.items(), strict=True):
        x, y = samples.flatten(0, 1).T.numpy()
        span = [[-EXTENT, EXTENT]] * 2
        axis.hist2d(x, y, bins=BINS, range=span, cmap="magma_r", vmax=POINTS * LABELS / 180)
        axis.set_title(f"{title}: {float(world.reward(samples.flatten(0, 1)).mean()):+.2f}", fontsize=8)
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_aspect("equal")
    return _small(figure)


def of_notebook(name: str, number: int) -> bytes:
    """Return a PNG of the picture of that number, from 0, among the outputs that a notebook is saved with."""
    cells = json.loads((record.HERE.parent / "notebooks" / f"{name}.ipynb").read_text("utf-8"))["cells"]
    data = (output.get("data", {}) for cell in cells for output in cell.get("outputs", []))
    pictures = [found["image/png"] for found in data if "image/png" in found]
    return base64.b64decode("".join(pictures[number]))


def _small(figure: Figure) -> bytes:
    drawn, out = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(out, "png", optimize=True)
    return out.getvalue()


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


def main(argv: list[str] | None = None) -> None:
    """Make the requested figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="A,B", help="names of figures; made again")
    only = parser.parse_args(argv).only
    matplotlib.use("agg")
    torch.set_num_threads(1)
    rows = methods.current()
    jobs: dict[str, Any] = {
        "ranks": lambda: save("ranks", ranks(rows)),
        "compute": lambda: save("compute", compute(rows)),
        "time_accuracy": lambda: save("time_accuracy", time_accuracy.figure()),
        "reward_likes": lambda: write_atomic(
            FOLDER / "reward_likes.png", of_notebook("what_a_reward_likes", 1)
        ),
    }
    if trials := [t for t in tuning.tried() if "world" in t]:
        jobs["sensitivity"] = lambda: save("sensitivity", sensitivity(trials))
    if trained := over_optimisation.current():
        start = over_optimisation.base(over_optimisation.PROMPTS)
        jobs["over_optimisation"] = lambda: save("over_optimisation", over_training(start, trained))
    for method, row in PLANE_METHODS.items():
        file = FOLDER / f"plane_{method}.png"
        jobs[file.stem] = lambda file=file, row=row: write_atomic(file, plane(row))
    chosen = only.split(",") if only else [n for n in jobs if not (FOLDER / f"{n}.png").exists()]
    if unknown := [name for name in chosen if name not in jobs]:
        raise SystemExit(f"--only {','.join(unknown)}: no such figure; allowed: {', '.join(jobs)}")
    FOLDER.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name in chosen:
            jobs[name]()
            print(name, flush=True)


if __name__ == "__main__":
    main()
