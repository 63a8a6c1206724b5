"""Claims of the papers, put to the test on the plane and on the tiny SDXL, and reported either way.

    python -m benchmarks.claims                    # everything that is not there yet
    python -m benchmarks.claims --world plane --claims inpo,sdpo

Resumable and shared out among processes like ``benchmarks.methods``: an arm of a comparison is a row under
``benchmarks/rows``, ``benchmarks/claims.md`` is made from all that are there. A verdict is read off the 95 %
intervals of the comparisons that decide (over prompts and seeds, paired by prompt, noise and seed), never set
by hand.
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
PAIRS = 600  # held-out pairs of the plane on which errors are followed
BETAS = (0.25, 1.0, 4.0, 16.0)  # multiples of a row's beta that a tuned arm tries first
HALVINGS = 3  # then it closes in on the smallest beta that stays on the support
TUNING_SEED, TUNING_POINTS, OFF_SUPPORT = 100, 900, 0.03


def make(arm: Arm, seed: int) -> Row | None:
    """Return an arm's row, read or made; None while another process makes it."""
    name = f"claim-{arm.name}-{seed}"
    arm = settled(arm) if arm.tuned else arm
    asked = asking(arm, seed)
    with record.lock(name, wait=False) as mine:
        if not mine:
            return None
        found = record.known(name, asked)
        if found is None:
            say(f"{name} ...")
            made = on_leaderboard(arm, seed, asked) or measured(arm, seed, name)
            found = record.keep(name, asked, {"seed": seed, **made})
        return found


def on_leaderboard(arm: Arm, seed: int, asked: dict[str, object]) -> dict[str, Any] | None:
    """Return the figures of the leaderboard's row of the same settings, if there is one."""
    same = {k: v for k, v in asked.items() if k not in ("errors", "memory")}
    row = record.known(f"{arm.world}-{arm.recipe or arm.method}-{seed}", same)
    if row is None or arm.value != "gain":
        return None
    return {k: v for k, v in row.items() if k in ("rewards", "gains", "figures", "verdict", "primary", *COST)}


def settled(arm: Arm) -> Arm:
    """Return the arm with the beta that gives the largest gain with less than 3 % of the mass off the
    support.
    """
    asked = {**plane_world.asked(arm.row, TUNING_POINTS, arm.steps), "betas": [BETAS, HALVINGS]}
    name = f"tuned-{arm.name}"
    with record.lock(name):
        found = record.known(name, asked)
        if found is None:
            trials = search(lambda factor: tried(arm, factor))
            found = record.keep(name, asked, {"trials": trials, "best": best(trials)})
    return replace(arm, row=replace(arm.row, method=scaled(arm.row.method, found["best"]["factor"])))


def tried(arm: Arm, factor: float) -> dict[str, float]:
    """Gain and mass off the support with a multiple of an arm's beta."""
    row = replace(arm.row, method=scaled(arm.row.method, factor))
    made = plane_world.run(row, TUNING_SEED, TUNING_POINTS, arm.steps)
    gain = made["rewards"]["height"]["gain"][0]
    return {"factor": factor, "gain": gain, "off support": made["figures"]["off support"]}


def search(trial: Callable[[float], dict[str, float]]) -> list[dict[str, float]]:
    """Return the first betas, then geometric means of the best one and its lower neighbour."""
    trials = [trial(factor) for factor in BETAS]
    for _ in range(HALVINGS):
        factor = best(trials)["factor"]
        lower = [t["factor"] for t in trials if t["factor"] < factor]
        trials.append(trial(math.sqrt(factor * max(lower)) if lower else factor / 2))
    return trials


def best(trials: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest gain on the support; if all have left it, whatever has left it least."""
    staying = [trial for trial in trials if trial["off support"] < OFF_SUPPORT]
    if not staying:
        return min(trials, key=lambda trial: trial["off support"])
    return max(staying, key=lambda trial: trial["gain"])


def scaled(method: Any, factor: float) -> Any:
    """Return a method, in a strategy or not, with a multiple of its beta."""
    if isinstance(method, Wrapped):
        return replace(method, method=scaled(method.method, factor))
    return replace(method, beta=method.beta * factor)


def asking(arm: Arm, seed: int) -> dict[str, object]:
    """Return the settings that identify an arm's row."""
    if arm.world == "plane":
        points = PAIRS if arm.value in ("chosen", "rejected") else POINTS
        return {**plane_world.asked(arm.row, points, arm.steps), "errors": points == PAIRS}
    run = tiny_world.recipe(arm.recipe, arm.flags, seed)
    return {**tiny_world.asked(run, "test", PROMPTS, arm.steps), "memory": arm.value == "memory"}


def measured(arm: Arm, seed: int, name: str) -> dict[str, object]:
    """Run an arm."""
    if arm.world == "plane":
        if arm.value in ("chosen", "rejected"):
            return plane_world.drift(arm.row, seed, PAIRS, arm.steps)
        return plane_world.run(arm.row, seed, POINTS, arm.steps)
    run = tiny_world.recipe(arm.recipe, arm.flags, seed)
    if arm.value == "memory":
        return {"memory": step_memory(run), "calls": vars(tiny_world.cost(run))}
    return tiny_world.run(name, run, "test", PROMPTS, arm.steps)


def wanted(claims: list[Claim], worlds: list[str], seeds: int) -> Iterator[tuple[Arm, int]]:
    """Every arm with every seed, each once; memory is the same for every seed."""
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
    """``claims.md`` of all rows."""
    with record.lock("claims"):
        rows = {row["name"]: row for row in record.rows("claim-")}
        write_atomic(record.HERE / "claims.md", text(CLAIMS(), rows))


def main(argv: list[str] | None = None) -> None:
    """Make every row that is wanted and not there."""
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
    for arm, seed in wanted([every[name] for name in names], worlds, arguments.seeds):
        if not available(arm):
            say(f"{arm.name}: no such method yet")
        elif make(arm, seed) is not None:
            write()


if __name__ == "__main__":
    main()
