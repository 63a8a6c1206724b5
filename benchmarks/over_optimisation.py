"""Over-optimisation on the tiny SDXL: the trained reward against held-out rewards over training.

    python -m benchmarks.over_optimisation                          # every row that is missing
    python -m benchmarks.over_optimisation --arms draft,ddpo --seeds 1

Each arm is trained once a seed by its shipped tiny recipe up to twice the leaderboard's online budget. At the
same fractions of the budget, images of test captions are drawn from the base's noise and scored by the reward
that is trained on and by those that are not. A row is an arm, a seed and a fraction, a file under
``benchmarks/rows``; ``over_optimisation.md`` is made of all rows that are there. A fraction of all arms is
made before the next one, which continues from the arm's last checkpoint while its run is there.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import arms, record
from benchmarks.over_optimisation_page import ARMS, FRACTIONS, MEASURED, Arm, text
from benchmarks.record import Row, lock
from benchmarks.tiny_world import (
    ONLINE_BUDGET,
    base_diversity,
    cost,
    digest,
    diversity,
    drift,
    quiet,
    recipe,
    round_of,
    scores,
    settings_of,
)
from diffalign.config.schema import ModelConfig, Run
from diffalign.models.loading import load
from diffalign.runs.align import align
from diffalign.runs.load_pipeline import open_model
from diffalign.training.checkpoint import Checkpoints

PROMPTS = 192
ORDER = (1, 2, 3, 0, 4)  # the first is measured late, from its checkpoint, for an early course of all arms
MODEL = ModelConfig("tiny:sdxl")


@dataclass(frozen=True)
class Stage:
    """The training of an arm up to a point: index into ``FRACTIONS``."""

    arm: Arm
    point: int

    @property
    def name(self) -> str:
        """The name of the arm."""
        return self.arm.name


STAGES = tuple(Stage(arm, point) for point in ORDER for arm in ARMS)


def planned(stage: Stage, seed: int) -> tuple[Run, float]:
    """Return the run up to a stage, and the cost of a step in forward-equivalents.

    A checkpoint is made after each round of samples, or every eighth of the budget without rounds. The run
    stops at the checkpoint that is nearest to the fraction of the budget.
    """
    run = recipe(stage.arm.method, stage.arm.flags, seed)
    calls = cost(run).cost
    every = round_of(run) or max(1, round(FRACTIONS[0] * ONLINE_BUDGET / calls))
    steps = every * max(1, round(FRACTIONS[stage.point] * ONLINE_BUDGET / calls / every))
    name = f"overopt-{stage.name}-{seed}-{digest(settings_of(run, '', 0))}"
    run = replace(
        run,
        output=str(record.WORK / "work" / name),
        training=replace(run.training, steps=steps),
        checkpoint=replace(run.checkpoint, every=every, limit=0),
        resume="latest",
    )
    return run, calls


def base(prompts: int) -> Row:
    """Return the row of the base."""
    asked = {"prompts": prompts, "rewards": MEASURED}
    found = record.known("overopt-base", asked)
    if found is None:
        table = scores(load(MODEL).pipeline, "test", prompts, rewards=MEASURED)
        spread = base_diversity(MODEL, "test")
        found = record.keep("overopt-base", asked, {"scores": table, "diversity": round(spread, 5)})
    return found


def measured(checkpoint: Path, prompts: int) -> dict[str, Any]:
    """Return scores, diversity and drift of a checkpoint of a run."""
    start, model = load(MODEL), open_model(str(checkpoint), None, "cpu")
    model.pipeline.fuse_lora()  # reduces the sampling time to 60 %
    return {
        "scores": scores(model.pipeline, "test", prompts, rewards=MEASURED),
        "diversity": round(diversity(model.pipeline, "test") / base_diversity(MODEL, "test"), 4),
        "drift": round(drift(model, start, "test"), 3),
    }


def trained(run: Run) -> tuple[Path, int, float]:
    """Train up to the run's last step, from its newest checkpoint if it has one.

    Returns:
        The checkpoint of the last step, the step from which training went on, and CPU seconds.
    """
    folder, last = Path(run.output) / "checkpoints", run.training.steps
    found = Checkpoints(folder).steps()
    if last in found:
        return folder / f"step-{last}", last, 0.0
    begin = time.process_time()
    if align(run, quiet).interrupted:
        raise KeyboardInterrupt
    return folder / f"step-{last}", max(found, default=0), time.process_time() - begin


def make(stage: Stage, seed: int, prompts: int) -> Row | None:
    """Return the row of a stage and a seed, made if it is missing; None if another process trains the arm."""
    name = f"overopt-{stage.name}-{seed}-{stage.point}"
    with lock(f"overopt-{stage.name}-{seed}", wait=False) as mine:
        if not mine:
            return None
        run, calls = planned(stage, seed)
        steps = run.training.steps
        asked = settings_of(run, "test", prompts, steps) | {"rewards": MEASURED}
        if (found := record.known(name, asked)) is not None:
            return found
        print(f"{name}: to step {steps} ...", flush=True)
        checkpoint, since, seconds = trained(run)
        row = {"arm": stage.name, "seed": seed, "point": stage.point, "trained": stage.arm.trained}
        row |= {"compute": round(steps * calls / ONLINE_BUDGET, 4), **measured(checkpoint, prompts)}
        row |= {"seconds": round(seconds, 1), "since": since}
        if stage.point == len(FRACTIONS) - 1:
            shutil.rmtree(run.output)
        print(f"{name}: {seconds:.0f} s of training", flush=True)
        return record.keep(name, asked, row)


def current() -> list[Row]:
    """Return the rows of arms."""
    return [row for row in record.rows("overopt-") if "arm" in row]


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is requested and missing."""

    def page(prompts: int) -> str:
        return text(base(prompts), current())

    arms.main("over_optimisation", __doc__, STAGES, make, page, prompts=PROMPTS, argv=argv)


if __name__ == "__main__":
    main()
