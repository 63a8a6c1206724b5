"""Try settings of DPO for the benchmark of edits, on edits of the validation split; nothing is kept.

    python -m benchmarks.edits_tuning own,300,3e-4,40 renders,1000,2e-4,40   # arm, beta, rate, steps

One seed and 96 edits each. The settings of ``benchmarks.edits.ARMS`` were found so.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import edit_world
from benchmarks.edit_world import SCORES
from benchmarks.edits import ARMS, Arm, gained, run_of
from diffalign.models.loading import load

PROMPTS = 96


def arm_of(words: str) -> Arm:
    """Return the arm of ``NAME,BETA,RATE,STEPS``.

    Raises:
        argparse.ArgumentTypeError: other words.
    """
    name, *values = words.split(",")
    arms = {arm.name: arm for arm in ARMS}
    if name not in arms or len(values) != 3:
        raise argparse.ArgumentTypeError(f"{words!r}; allowed: ARM,BETA,RATE,STEPS with ARM of {list(arms)}")
    beta, rate, steps = values
    return replace(arms[name], beta=float(beta), rate=float(rate), steps=int(steps))


def main(argv: Sequence[str] | None = None) -> None:
    """Print the gains of every trial."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edits_tuning", description=__doc__)
    parser.add_argument("trials", nargs="+", type=arm_of, metavar="ARM,BETA,RATE,STEPS")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    trials: list[Arm] = parser.parse_args(argv).trials
    start = edit_world.judged(load(edit_world.model()).pipeline, PROMPTS, "validation")
    print("base", {name: round(sum(start[name]) / PROMPTS, 3) for name in SCORES}, flush=True)
    for arm in trials:
        run = replace(run_of(arm, 0), output=f"{run_of(arm, 0).output}-tuning")
        row = edit_world.trained(run, PROMPTS, "validation")
        settings = f"{arm.name}, beta {arm.beta}, rate {arm.rate:g}, {arm.steps} steps"
        print(f"{settings}: {gained(row, start)}", flush=True)
        print(f"  {row['seconds']} s; {row['verdict']}", flush=True)


if __name__ == "__main__":
    main()
