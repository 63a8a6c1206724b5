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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import arms, record
from benchmarks.record import Row, lock, over_seeds, shown
from benchmarks.tiny_world import (
    DRIFT_STEPS,
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
from diffalign.evaluation.measuring.statistics import Estimate
from diffalign.models.loading import load
from diffalign.runs.align import align
from diffalign.runs.demo import REWARDS
from diffalign.runs.load_pipeline import open_model
from diffalign.training.checkpoint import Checkpoints

PROMPTS = 192
FRACTIONS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the budget
LABELS = ("1/8", "1/4", "1/2", "1", "2")
ORDER = (1, 2, 3, 0, 4)  # the first is measured late, from its checkpoint, for an early course of all arms
MEASURED = (*REWARDS, "step_aware:tiny")
TITLES = dict(zip(MEASURED, ("judge", "taste", "tiny CLIP", "step-aware model"), strict=True))
MODEL = ModelConfig("tiny:sdxl")


@dataclass(frozen=True)
class Arm:
    """A method with settings.

    Attributes:
        name: of its rows.
        says: what it is.
        method: name of its tiny recipe, without the prefix.
        trained: the reward that it is trained on, or that its pairs are ordered by.
        flags: what differs from the recipe.
    """

    name: str
    says: str
    method: str
    trained: str
    flags: tuple[str, ...] = ()

    @property
    def held_out(self) -> tuple[str, ...]:
        """The rewards that it is not trained on."""
        return tuple(name for name in MEASURED if name != self.trained)


ARMS = (
    Arm("draft", "DRaFT-3 as shipped: a penalty on the distance to the reference", "draft", "tiny_clip"),
    Arm("draft-free", "DRaFT-3 without the penalty", "draft", "tiny_clip", ("--method.hold=0",)),
    Arm("ddpo", "DDPO", "ddpo", "judge"),
    Arm("spo", "SPO", "spo", "step_aware:tiny"),
    Arm("dpo", "Diffusion-DPO, shipped pairs, which the judge ordered", "dpo", "judge"),
)


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


def course_of(arm: Arm, rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of an arm by point and seed: the points that its first seed has, and the seeds that
    have them all.
    """
    own = {(row["seed"], row["point"]): row for row in rows if row["arm"] == arm.name}
    points = sorted(point for seed, point in own if seed == 0)
    seeds = [s for s in sorted({seed for seed, _ in own}) if all((s, point) in own for point in points)]
    return [[own[seed, point] for seed in seeds] for point in points]


def curve(start: Row, points: Sequence[Sequence[Row]], reward: str) -> NDArray[np.float64]:
    """Return gains (1 + points, seeds, prompts) of one arm's rows over the base, which is the first point."""
    before = np.asarray(start["scores"][reward])
    after = [[row["scores"][reward] for row in seeds] for seeds in points]
    gains: NDArray[np.float64] = np.asarray(after) - before
    return np.concatenate([np.zeros_like(gains[:1]), gains])


def fall(gains: NDArray[np.float64]) -> tuple[int, Estimate]:
    """Return the point of the highest mean of gains (points, seeds, prompts), and the change from it to the
    last point.
    """
    peak = int(gains.mean((1, 2)).argmax())
    return peak, over_seeds(gains[-1] - gains[peak])


def labels_of(points: Sequence[Sequence[Row]]) -> list[str]:
    """Return the names of an arm's points, the base first."""
    return ["base", *(LABELS[seeds[0]["point"]] for seeds in points)]


def course(gains: NDArray[np.float64], labels: Sequence[str]) -> str:
    """Say where gains (points, seeds, prompts) are highest, and whether a fall follows."""
    peak, change = fall(gains)
    if peak == len(gains) - 1:
        said = over_seeds(gains[-1])
        return "highest at the end" if said.low > 0 else "no change shown"
    where = "never above the base" if peak == 0 else f"highest at {labels[peak]}"
    if change.high < 0:
        return f"{where}, then falls: {shown(change)}"
    return f"{where}, no fall shown"


def judged(arm: Arm, curves: Mapping[str, NDArray[np.float64]], labels: Sequence[str]) -> str:
    """Say in a sentence which held-out rewards fall while the trained one rises."""
    end = over_seeds(curves[arm.trained][-1])
    trained = f"{TITLES[arm.trained]} (trained on): {shown(end)} at compute {labels[-1]}"
    found = []
    for name in arm.held_out:
        peak, change = fall(curves[name])
        rise = over_seeds(curves[arm.trained][-1] - curves[arm.trained][peak])
        if change.high < 0 and rise.low > 0:
            since = "the base" if peak == 0 else f"compute {labels[peak]}"
            found.append(
                f"from {since} on the trained reward rises by {shown(rise)} and {TITLES[name]} falls by "
                f"{shown(change)}"
            )
    if not found:
        return f"{trained}; no held-out reward is shown to fall while it rises."
    return f"{trained}. **Over-optimised**: {'; '.join(found)}."


def _table(arm: Arm, points: Sequence[Sequence[Row]], curves: Mapping[str, NDArray[np.float64]]) -> list[str]:
    order = (arm.trained, *arm.held_out)
    labels = labels_of(points)
    heads = [f"{TITLES[name]}{' (trained on)' if name == arm.trained else ''}" for name in order]
    lines = [
        f"| compute | steps | {' | '.join(heads)} | diversity | drift |",
        "|---|" + "---|" * (len(order) + 3),
    ]
    for i, seeds in enumerate(points):
        cells = [shown(over_seeds(curves[name][i + 1])) for name in order]
        spread, away = (np.mean([row[key] for row in seeds]) for key in ("diversity", "drift"))
        where = f"{labels[i + 1]} | {seeds[0]['asked']['steps']}"
        lines.append(f"| {where} | {' | '.join(cells)} | {spread:.2f} | {away:.2f} |")
    lines.append(f"| course | | {' | '.join(course(curves[name], labels) for name in order)} | | |")
    return lines


def _how(start: Row, seeds: Sequence[int]) -> str:
    alone = " (of captions alone for an arm with one seed)" if 1 in seeds else ""
    return (
        "`python -m benchmarks.over_optimisation` makes what is missing. Each method is trained by its "
        f"shipped tiny recipe; compute 1 is the leaderboard's online budget, {ONLINE_BUDGET:.0f} "
        "forward-equivalents of the network, for all of them. Each fraction is measured at the nearest "
        "checkpoint, which lies between two rounds of samples. Gains over the base are of images of "
        f"{start['asked']['prompts']} held-out captions from the same noise, with 95 % intervals by a "
        f"bootstrap over captions and seeds{alone}. The step-aware model was fine-tuned from the tiny CLIP "
        "on the judge's order, so these three are related; taste reads the vividness of the things, whatever "
        "the caption. Diversity is that of images of one caption, as a share of the base's. Drift is the KL "
        f"of the sampling process to the base's in nats an image, {DRIFT_STEPS} steps. The point where a "
        "curve is highest is chosen on the images on which the fall after it is measured, which overstates "
        "falls."
    )


def text(start: Row, rows: Sequence[Row]) -> str:
    """Return the page of every row."""
    by_arm = {arm: points for arm in ARMS if (points := course_of(arm, rows))}
    curves = {arm: {name: curve(start, points, name) for name in MEASURED} for arm, points in by_arm.items()}
    how = _how(start, [len(points[0]) for points in by_arm.values()])
    lines = ["# Over-optimisation on the tiny SDXL", "", how, ""]
    lines += ["| arm | trained on | seeds | CPU s a step |", "|---|---|---|---|"]
    for arm, points in by_arm.items():
        trained = [row for seeds in points for row in seeds if row["asked"]["steps"] > row["since"]]
        count = sum(row["asked"]["steps"] - row["since"] for row in trained)
        seconds = sum(row["seconds"] for row in trained) / count if count else float("nan")
        lines.append(f"| {arm.name}: {arm.says} | {TITLES[arm.trained]} | {len(points[0])} | {seconds:.2f} |")
    lines.append("")
    lines += [
        f"- {arm.name}: {judged(arm, curves[arm], labels_of(points))}" for arm, points in by_arm.items()
    ]
    for arm, points in by_arm.items():
        lines += ["", f"## {arm.name}: {arm.says}", "", *_table(arm, points, curves[arm])]
    lines += ["", arms.made_on([start, *rows])]
    return "\n".join(lines) + "\n"


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
