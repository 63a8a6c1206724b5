"""Test claims of the papers on the plane and on the tiny SDXL, and report the results of all of them.

    python -m benchmarks.claims                    # all missing rows
    python -m benchmarks.claims --world plane --claims inpo,sdpo

Runs resume, and several processes share the work, as in ``benchmarks.methods``. An arm of a comparison with a
seed is a row under ``benchmarks/rows``; ``benchmarks/claims.md`` is made from all rows. Verdicts are computed
from the 95 % intervals of the deciding comparisons (over prompts and seeds, paired by prompt, noise and
seed).
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import plane_world, record, tiny_world
from benchmarks.claims_list import CLAIMS, Arm, Claim, available
from benchmarks.claims_table import text
from benchmarks.memory import step_memory
from benchmarks.methods import POINTS, PROMPTS, say
from benchmarks.record import Row
from diffalign.strategies._common import Wrapped
from diffalign.utils.files import write_atomic

COST = ("steps", "seconds", "calls", "compute")
PAIRS = 600  # held-out pairs of the plane on which denoising errors are measured
BETAS = (0.25, 1.0, 4.0, 16.0)  # multiples of a row's beta that a tuned arm tries first
HALVINGS = 3  # further trials, towards the smallest beta that stays on the support
TUNING_SEED, TUNING_POINTS, OFF_SUPPORT = 100, 900, 0.03


def make(arm: Arm, seed: int) -> Row | None:
    """Return an arm's row, read or made; None while another process makes it."""
    name = f"claim-{arm.name}-{seed}"
    arm = tuned(arm) if arm.tuned else arm
    settings = settings_of(arm, seed)
    with record.lock(name, wait=False) as acquired:
        if not acquired:
            return None
        row = record.known(name, settings)
        if row is None:
            say(f"{name} ...")
            figures = on_leaderboard(arm, seed, settings) or measured(arm, seed, name)
            row = record.keep(name, settings, {"seed": seed, **figures})
        return row


def on_leaderboard(arm: Arm, seed: int, settings: dict[str, object]) -> dict[str, Any] | None:
    """Return the figures of the leaderboard's row with the same settings, or None."""
    same = {k: v for k, v in settings.items() if k not in ("errors", "memory")}
    row = record.known(f"{arm.world}-{arm.recipe or arm.method}-{seed}", same)
    if row is None or arm.value != "gain":
        return None
    return {k: v for k, v in row.items() if k in ("rewards", "gains", "figures", "verdict", "primary", *COST)}


def tuned(arm: Arm) -> Arm:
    """Return the arm with the beta of the largest gain among those with less than 3 % off the support."""
    settings = {**plane_world.settings_of(arm.row, TUNING_POINTS, arm.steps), "betas": [BETAS, HALVINGS]}
    name = f"tuned-{arm.name}"
    with record.lock(name):
        row = record.known(name, settings)
        if row is None:
            trials = search(lambda factor: trial_of(arm, factor))
            row = record.keep(name, settings, {"trials": trials, "best": best(trials)})
    return replace(arm, row=replace(arm.row, method=scaled(arm.row.method, row["best"]["factor"])))


def trial_of(arm: Arm, factor: float) -> dict[str, float]:
    """Measure the gain and the mass off the support with a multiple of an arm's beta."""
    row = replace(arm.row, method=scaled(arm.row.method, factor))
    result = plane_world.run(row, TUNING_SEED, TUNING_POINTS, arm.steps)
    gain = result["rewards"]["height"]["gain"][0]
    return {"factor": factor, "gain": gain, "off support": result["figures"]["off support"]}


def search(trial: Callable[[float], dict[str, float]]) -> list[dict[str, float]]:
    """Return the trials: the first betas, then geometric means of the best one and its lower neighbour."""
    trials = [trial(factor) for factor in BETAS]
    for _ in range(HALVINGS):
        factor = best(trials)["factor"]
        lower = [t["factor"] for t in trials if t["factor"] < factor]
        trials.append(trial(math.sqrt(factor * max(lower)) if lower else factor / 2))
    return trials


def best(trials: list[dict[str, float]]) -> dict[str, float]:
    """Return the trial of the largest gain on the support, or of the least mass off it if all leave it."""
    on_support = [trial for trial in trials if trial["off support"] < OFF_SUPPORT]
    if not on_support:
        return min(trials, key=lambda trial: trial["off support"])
    return max(on_support, key=lambda trial: trial["gain"])


def scaled(method: Any, factor: float) -> Any:
    """Return a method, possibly inside a strategy, with its beta multiplied by ``factor``."""
    if isinstance(method, Wrapped):
        return replace(method, method=scaled(method.method, factor))
    return replace(method, beta=method.beta * factor)


def settings_of(arm: Arm, seed: int) -> dict[str, object]:
    """Return the settings that identify an arm's row."""
    if arm.world == "plane":
        points = PAIRS if arm.value in ("chosen", "rejected") else POINTS
        return {**plane_world.settings_of(arm.row, points, arm.steps), "errors": points == PAIRS}
    run = tiny_world.recipe(arm.recipe, arm.flags, seed)
    return {**tiny_world.settings_of(run, "test", PROMPTS, arm.steps), "memory": arm.value == "memory"}


def measured(arm: Arm, seed: int, name: str) -> dict[str, object]:
    """Run an arm and return the figures of its row."""
    if arm.world == "plane":
        if arm.value in ("chosen", "rejected"):
            return plane_world.drift(arm.row, seed, PAIRS, arm.steps)
        return plane_world.run(arm.row, seed, POINTS, arm.steps)
    run = tiny_world.recipe(arm.recipe, arm.flags, seed)
    if arm.value == "memory":
        return {"memory": step_memory(run), "calls": vars(tiny_world.cost(run))}
    return tiny_world.run(name, run, "test", PROMPTS, arm.steps)


def requested(claims: list[Claim], worlds: list[str], seeds: int) -> Iterator[tuple[Arm, int]]:
    """Yield every arm with every seed once; memory does not depend on the seed and has seed 0 only."""
    done = set()
    for seed in range(seeds):
        for claim in claims:
            for comparison in claim.comparisons:
                for arm in comparison.arms:
                    key = (arm.name, seed)
                    if arm.world in worlds and key not in done and (seed == 0 or arm.value != "memory"):
                        done.add(key)
                        yield arm, seed


def write() -> None:
    """Write ``claims.md`` from all rows."""
    with record.lock("claims"):
        rows = {row["name"]: row for row in record.rows("claim-")}
        write_atomic(record.HERE / "claims.md", text(CLAIMS(), rows))


def main(argv: list[str] | None = None) -> None:
    """Make every requested row that is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("plane", "tiny"), help="default: both")
    parser.add_argument("--claims", help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process; start several")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    every = {claim.name: claim for claim in CLAIMS()}
    names = arguments.claims.split(",") if arguments.claims else list(every)
    unknown = [name for name in names if name not in every]
    if unknown:
        raise SystemExit(f"--claims {unknown[0]}: no such claim; allowed: {', '.join(every)}")
    worlds = [arguments.world] if arguments.world else ["plane", "tiny"]
    for arm, seed in requested([every[name] for name in names], worlds, arguments.seeds):
        if not available(arm):
            say(f"{arm.name}: no such method yet")
        elif make(arm, seed) is not None:
            write()


if __name__ == "__main__":
    main()
