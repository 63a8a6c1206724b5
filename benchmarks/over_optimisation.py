"""Over-optimisation on the tiny SDXL: the trained reward against held-out rewards over training.

    python -m benchmarks.over_optimisation                          # every row that is missing
    python -m benchmarks.over_optimisation --arms draft,ddpo --seeds 1

Each arm is trained once a seed by its shipped tiny recipe to twice the leaderboard's online budget, with
checkpoints on the way. At the same fractions of the budget, images of test captions are drawn from the base's
noise and scored by the reward that is trained on and by those that are not. A row is an arm and a seed, a
file under ``benchmarks/rows``; ``over_optimisation.md`` is made of all rows that are there.
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

PROMPTS = 192
FRACTIONS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the budget
LABELS = ("base", "1/8", "1/4", "1/2", "1", "2")
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


def schedule(cost: float, every: int) -> list[int]:
    """Return the steps of the checkpoints that are measured: those nearest to ``FRACTIONS`` of the budget.

    Args:
        cost: forward-equivalents of a step.
        every: steps between two checkpoints.
    """
    return [every * max(1, round(part * ONLINE_BUDGET / cost / every)) for part in FRACTIONS]


def planned(arm: Arm, seed: int) -> tuple[Run, list[int], float]:
    """Return the run of an arm and a seed, the steps of its checkpoints to measure, and the cost of a step.

    A checkpoint is made after each round of samples, or every eighth of the budget without rounds.
    """
    run = recipe(arm.method, arm.flags, seed)
    calls = cost(run).cost
    every = round_of(run) or max(1, round(FRACTIONS[0] * ONLINE_BUDGET / calls))
    steps = schedule(calls, every)
    run = replace(
        run,
        output=str(record.WORK / "work" / f"overopt-{arm.name}-{seed}"),
        training=replace(run.training, steps=steps[-1]),
        checkpoint=replace(run.checkpoint, every=every, limit=0),
    )
    return run, steps, calls


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


def make(arm: Arm, seed: int, prompts: int) -> Row | None:
    """Return the row of an arm and a seed, made if it is missing; None if another process makes it."""
    name = f"overopt-{arm.name}-{seed}"
    with lock(name, wait=False) as mine:
        if not mine:
            return None
        run, steps, calls = planned(arm, seed)
        budgets = {"budget": ONLINE_BUDGET, "steps": steps, "rewards": MEASURED}
        asked = settings_of(run, "test", prompts) | budgets
        if (found := record.known(name, asked)) is not None:
            return found
        print(f"{name}: {steps[-1]} steps ...", flush=True)
        begin = time.process_time()
        result = align(run, quiet)
        seconds = time.process_time() - begin
        if result.aligned is None:
            raise KeyboardInterrupt
        points = [
            {"step": step, "compute": round(step * calls / ONLINE_BUDGET, 4)}
            | measured(result.output / "checkpoints" / f"step-{step}", prompts)
            for step in steps
        ]
        row = {"arm": arm.name, "seed": seed, "trained": arm.trained, "points": points}
        row |= {"seconds": round(seconds, 1), "verdict": result.verdict}
        shutil.rmtree(result.output)
        print(f"{name}: {seconds:.0f} s", flush=True)
        return record.keep(name, asked, row)


def curve(start: Row, rows: Sequence[Row], reward: str) -> NDArray[np.float64]:
    """Return gains (1 + points, seeds, prompts) of one arm's rows over the base, which is the first point."""
    before = np.asarray(start["scores"][reward])
    points = len(rows[0]["points"])
    after = [[row["points"][i]["scores"][reward] for row in rows] for i in range(points)]
    gains: NDArray[np.float64] = np.asarray(after) - before
    return np.concatenate([np.zeros_like(gains[:1]), gains])


def fall(gains: NDArray[np.float64]) -> tuple[int, Estimate]:
    """Return the point of the highest mean of gains (points, seeds, prompts), and the change from it to the
    last point.
    """
    peak = int(gains.mean((1, 2)).argmax())
    return peak, over_seeds(gains[-1] - gains[peak])


def course(gains: NDArray[np.float64]) -> str:
    """Say where gains (points, seeds, prompts) are highest, and whether a fall follows."""
    peak, change = fall(gains)
    if peak == len(gains) - 1:
        said = over_seeds(gains[-1])
        return "highest at the end" if said.low > 0 else "no change shown"
    where = "never above the base" if peak == 0 else f"highest at {LABELS[peak]}"
    if change.high < 0:
        return f"{where}, then falls: {shown(change)}"
    return f"{where}, no fall shown"


def judged(arm: Arm, curves: Mapping[str, NDArray[np.float64]]) -> str:
    """Say in a sentence which held-out rewards fall while the trained one rises."""
    end = over_seeds(curves[arm.trained][-1])
    trained = f"{TITLES[arm.trained]} (trained on) ends at {shown(end)}"
    found = []
    for name in arm.held_out:
        peak, change = fall(curves[name])
        rise = over_seeds(curves[arm.trained][-1] - curves[arm.trained][peak])
        if change.high < 0 and rise.low > 0:
            since = "the base" if peak == 0 else f"{LABELS[peak]} of the budget"
            found.append(
                f"from {since} on the trained reward rises by {shown(rise)} and {TITLES[name]} falls by "
                f"{shown(change)}"
            )
    if not found:
        return f"{trained}; no held-out reward is shown to fall while it rises."
    return f"{trained}. **Over-optimised**: {'; '.join(found)}."


def _table(arm: Arm, rows: Sequence[Row], curves: Mapping[str, NDArray[np.float64]]) -> list[str]:
    order = (arm.trained, *arm.held_out)
    heads = [f"{TITLES[name]}{' (trained on)' if name == arm.trained else ''}" for name in order]
    steps = rows[0]["asked"]["steps"]
    lines = [
        f"| compute | steps | {' | '.join(heads)} | diversity | drift |",
        "|---|" + "---|" * (len(order) + 3),
    ]
    for i, step in enumerate(steps):
        cells = [shown(over_seeds(curves[name][i + 1])) for name in order]
        spread, away = (np.mean([row["points"][i][key] for row in rows]) for key in ("diversity", "drift"))
        lines.append(f"| {LABELS[i + 1]} | {step} | {' | '.join(cells)} | {spread:.2f} | {away:.2f} |")
    lines.append(f"| course | | {' | '.join(course(curves[name]) for name in order)} | | |")
    return lines


def text(start: Row, rows: Sequence[Row]) -> str:
    """Return the page of every row."""
    by_arm = {arm: [row for row in rows if row["arm"] == arm.name] for arm in ARMS}
    by_arm = {arm: group for arm, group in by_arm.items() if group}
    curves = {arm: {name: curve(start, group, name) for name in MEASURED} for arm, group in by_arm.items()}
    counts = {len(group) for group in by_arm.values()}
    least = min(counts, default=0)
    lines = [
        "# Over-optimisation on the tiny SDXL",
        "",
        "`python -m benchmarks.over_optimisation` makes what is missing. Each method is trained by its shipped "
        f"tiny recipe; compute 1 is the leaderboard's online budget, {ONLINE_BUDGET:.0f} forward-equivalents "
        "of the network, for all of them. A checkpoint is the nearest to its fraction that lies between two "
        f"rounds of samples. Gains over the base are of images of {start['asked']['prompts']} held-out "
        "captions from the same noise, with 95 % intervals by a bootstrap over captions and seeds"
        f"{'; arms with one seed have intervals over captions alone' if least == 1 else ''}. The step-aware "
        "model was fine-tuned from the tiny CLIP on the judge's order, so these three are kin; taste reads "
        "the vividness of the things, whatever the caption. Diversity is that of images of one caption, as a "
        f"share of the base's. Drift is the KL of the sampling process to the base's in nats an image, "
        f"{DRIFT_STEPS} steps. The point where a curve is highest is read off the same images as the fall "
        "after it, so that falls are somewhat overstated.",
        "",
        "| arm | trained on | seeds | CPU s of training |",
        "|---|---|---|---|",
    ]
    for arm, group in by_arm.items():
        seconds = np.mean([row["seconds"] for row in group])
        lines.append(f"| {arm.name}: {arm.says} | {TITLES[arm.trained]} | {len(group)} | {seconds:.0f} |")
    lines.append("")
    lines += [f"- {arm.name}: {judged(arm, curves[arm])}" for arm in by_arm]
    for arm, group in by_arm.items():
        lines += ["", f"## {arm.name}: {arm.says}", "", *_table(arm, group, curves[arm])]
    lines += ["", arms.made_on([start, *rows])]
    return "\n".join(lines) + "\n"


def current() -> list[Row]:
    """Return the rows of arms."""
    return [row for row in record.rows("overopt-") if "arm" in row]


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is requested and missing."""

    def page(prompts: int) -> str:
        return text(base(prompts), current())

    arms.main("over_optimisation", __doc__, ARMS, make, page, prompts=PROMPTS, argv=argv)


if __name__ == "__main__":
    main()
