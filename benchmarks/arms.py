"""The common part of benchmarks whose rows are arms with several seeds: runs, arguments and the page."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import record
from benchmarks.record import Row, shown
from diffalign.config.schema import Run, ValidationConfig
from diffalign.utils.files import write_atomic

NEVER = 7_207_200  # steps between checkpoints: a multiple of the steps of a round (up to 16, 20, ...)


def seeded(run: Run, seed: int) -> Run:
    """Return a run with a seed, and without checkpoints, trackers and validation."""
    return replace(
        run,
        overwrite=True,
        training=replace(run.training, seed=seed),
        checkpoint=replace(run.checkpoint, every=NEVER),
        logging=replace(run.logging, trackers=()),
        validation=ValidationConfig(),
    )


def made_on(rows: Sequence[Row]) -> str:
    """Return machine, version of torch and dates of rows, as a line for the page."""
    dates = sorted(row["date"] for row in rows)
    return f"{rows[0]['machine']}, torch {rows[0]['versions']['torch']}, {dates[0]} to {dates[-1]}."


def row_of(
    name: str, asked: Mapping[str, Any], facts: Callable[[], Row], line: Callable[[Row], str]
) -> Row | None:
    """Return a row, read or made; None while another process makes it.

    Args:
        name: name of the row.
        asked: settings that identify it.
        facts: makes it.
        line: what is printed of a new row.
    """
    with record.lock(name, wait=False) as mine:
        if not mine:
            return None
        found = record.known(name, asked)
        if found is None:
            print(f"{name} ...", flush=True)
            found = record.keep(name, asked, facts())
            print(f"{name}: {line(found)}", flush=True)
        return found


def rewarded(row: Row) -> str:
    """Return the gains of a row by reward, with their intervals, as a line."""
    return ", ".join(f"{name} {shown(reward['gain'])}" for name, reward in row["rewards"].items())


def gains(row: Row, reference: Mapping[str, list[float]], name: str) -> list[float]:
    """Return the gains of a row's scores over scores of the same prompts, by one reward."""
    return [b - a for a, b in zip(reference[name], row["scores"][name], strict=True)]


def main(
    name: str,
    about: str,
    arms: Sequence[Any],
    make: Callable[[Any, int, int], Row | None],
    text: Callable[[int], str],
    *,
    prompts: int,
    argv: Sequence[str] | None = None,
) -> None:
    """Make every row that is requested and missing, first seeds of all arms first.

    Args:
        name: name of the benchmark's module and of its page.
        about: docstring of the benchmark; its first line is the help.
        arms: all arms, each with a ``name``, in the order in which a seed's rows are made; parts of one arm
            have its name.
        make: (arm, seed, prompts) -> the row, read or made; None if another process makes it.
        text: prompts -> the page, of all rows that are there.
        prompts: default of ``--prompts``.
        argv: arguments of the command line; None: those of the process.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=about.splitlines()[0])
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process; start several")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    names = record.chosen(arguments.arms, list(dict.fromkeys(arm.name for arm in arms)))
    for seed in range(arguments.seeds):
        for arm in arms:
            if arm.name in names and make(arm, seed, arguments.prompts) is not None:
                with record.lock(name):
                    write_atomic(record.HERE / f"{name}.md", text(arguments.prompts))
