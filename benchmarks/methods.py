"""The leaderboard: methods on the plane and on the tiny image models, at equal compute.

    python -m benchmarks.methods                        # all missing rows
    python -m benchmarks.methods --world plane --methods dpo,inpo --seeds 3
    python -m benchmarks.methods --tune dpo,ipo          # the trials of these methods, on validation prompts
    python -m benchmarks.methods --world tiny --methods dpo,ipo --tuned   # trials, then five seeds

A row is (world, method, seed) and a file under ``benchmarks/rows``. It is written as soon as it is made, so
an interrupted run resumes, and concurrent processes share the rows. ``benchmarks/methods.json``,
``methods.md`` and ``tuned.md`` are made from all rows. A row whose settings have changed is made again. With
``--tuned`` a method of a tiny image model is trained with the settings of its best trial
(``benchmarks.tuning``), without with its recipe's; both rows are kept, so that ``tuned.md`` says what tuning
changed.

Compute is counted at the network: a sample forward without gradient costs 1, forward and backward 3. The
number of steps of a method is the budget divided by its measured cost per step.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import plane_world, record, tiny_world, tuned_page, tuning
from benchmarks.record import Row
from benchmarks.tables import text
from diffalign.config.schema import Run
from diffalign.plane.settings import PLANE_METHODS
from diffalign.utils.files import write_atomic

WORLDS = ("plane", *tiny_world.PREFIXES)
POINTS = 1500  # starting points on the plane, for a standard error of the gain of about 0.01
SEEDS, TUNED_SEEDS = 3, 5
PROMPTS = 384  # prompts of a tiny image model, for a standard error of about 0.008 in a fifth of a row's time


def names(world: str) -> list[str]:
    """Return the methods that have settings for a world."""
    if world == "plane":
        return list(PLANE_METHODS)
    return tiny_world.names(world)


def planned(world: str, method: str, seed: int, tuned: bool) -> tuple[str, Run, dict[str, Any]]:
    """Return name, recipe and tuning (trials and flags; or nothing) of a row of a tiny image model.

    With ``tuned`` the recipe has the settings that the trials have found, if the method has all its trials;
    without trials the row is that of the recipe as shipped.
    """
    finalists = tuning.chosen(method, world) if tuned else []
    found = {"trials": tuning.RUNS, "flags": finalists[0][0]["flags"]} if finalists else {}
    recipe = tiny_world.recipe(method, found.get("flags", []), seed, world)
    return f"{world}-{method}{'-tuned' if found else ''}-{seed}", recipe, found


def make(world: str, method: str, seed: int, prompts: int, tuned: bool = False) -> Row | None:
    """Return a row, read or made; None while another process makes it.

    Args:
        world: one of ``WORLDS``.
        method: name of a method that has settings for the world.
        seed: seed of the training.
        prompts: held-out prompts of a tiny image model.
        tuned: train with the settings of the best trial, not with those of the recipe.
    """
    found: dict[str, Any] = {}
    if world == "plane":
        name, plane_row = f"{world}-{method}-{seed}", PLANE_METHODS[method]
        settings = plane_world.settings_of(plane_row, POINTS)
    else:
        name, recipe, found = planned(world, method, seed, tuned)
        settings = tiny_world.settings_of(recipe, "test", prompts)
    with record.lock(name, wait=False) as acquired:
        if not acquired:
            return None
        row = record.known(name, settings)
        if row is None:
            say(f"{name} ...")
            if world == "plane":
                figures = plane_world.run(plane_row, seed, POINTS)
            else:
                figures = tiny_world.run(name, recipe, "test", prompts)
            row = {"world": world, "method": method, "seed": seed, **figures, **found}
            row = record.keep(name, settings, row)
            gain = figures["rewards"][figures["primary"]]["gain"]
            say(f"{name}: {record.shown(gain)}, {figures['seconds']:.0f} s")
        return row


def say(line: str) -> None:
    """Print a line of progress on stdout; the progress bars of the jobs are on stderr."""
    print(line, flush=True)


def current() -> list[Row]:
    """Return the rows of existing methods in the order of worlds, methods and seeds."""
    rows = [row for world in WORLDS for row in record.rows(f"{world}-")]
    order = {pair: i for i, pair in enumerate((w, m) for w in WORLDS for m in names(w))}
    rows = [row for row in rows if (row["world"], row["method"]) in order]  # without removed methods
    rows.sort(key=lambda row: (order[row["world"], row["method"]], "trials" in row, row["seed"]))
    firsts = {_table_of(row): row["asked"] for row in reversed(rows)}
    # rows with settings of before a change are not averaged with those of after
    return [row for row in rows if record.same(row["asked"], firsts[_table_of(row)])]


def _table_of(row: Row) -> tuple[str, str, bool]:
    return row["world"], row["method"], "trials" in row


def write() -> None:
    """Write ``methods.json``, ``methods.md`` and ``tuned.md`` from all rows."""
    with record.lock("methods"):
        rows = current()
        brief = [{k: v for k, v in row.items() if k not in ("gains", "other gains")} for row in rows]
        write_atomic(record.HERE / "methods.json", json.dumps({"rows": brief}, indent=1) + "\n")
        write_atomic(record.HERE / "methods.md", text(rows))
        write_atomic(record.HERE / "tuned.md", tuned_page.text(rows, list(tiny_world.PREFIXES)))


def requested(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield the rows that the command line names, the first seed of all methods first."""
    chosen = arguments.methods.split(",") if arguments.methods else None
    worlds = [arguments.world] if arguments.world else WORLDS
    for name in chosen or []:
        if not any(name in names(world) for world in worlds):
            allowed = sorted({n for world in worlds for n in names(world)})
            raise SystemExit(f"--methods {name}: no such method; allowed: {', '.join(allowed)}")
    for world in worlds:
        for seed in range(arguments.seeds):
            for name in names(world):
                if chosen is None or name in chosen:
                    yield world, name, seed


def main(argv: list[str] | None = None) -> None:
    """Make every requested row that is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=WORLDS, help="default: all")
    parser.add_argument("--methods", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, help="default: 3, with --tuned 5")
    parser.add_argument("--tuned", action="store_true", help="tune each method of a tiny image model first")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="held-out prompts of a tiny image model")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process; start several")
    parser.add_argument("--tune", metavar="A,B", help="only make the trials of these methods of --world")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.tune:
        for method in arguments.tune.split(","):
            tuning.tune(method, arguments.world or "tiny", say)
        return
    arguments.seeds = arguments.seeds or (TUNED_SEEDS if arguments.tuned else SEEDS)
    for world, method, seed in requested(arguments):
        tuned = arguments.tuned and world != "plane"
        if tuned:
            tuning.tune(method, world, say)
        if make(world, method, seed, arguments.prompts, tuned) is not None:
            write()


if __name__ == "__main__":
    main()
