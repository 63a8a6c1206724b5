"""A student of 4 steps of the tiny SDXL: Distillation-DPO against plain distillation, on held-out captions.

    python -m benchmarks.few_step                        # every row that is missing
    python -m benchmarks.few_step --arms plain --seeds 1

Every arm starts from the base, samples itself in 4 steps without guidance, and has the same number of student
steps on the same number of samples. Pairs are ordered by the judge of the drawn scenes. A row is an arm and a
seed, a file under ``benchmarks/rows``; ``few_step.md`` is made of all rows that are there. Images are of test
captions, in 4 steps from the same noise; the base is drawn in 4 and in 20.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import arms, record
from benchmarks.record import Row, over_seeds, shown, verdict
from benchmarks.tiny_world import scores, trained
from diffalign.config.schema import ModelConfig
from diffalign.evaluation.drawing.sampling import SamplingSettings
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.runs.demo import REWARDS
from diffalign.runs.validate import read_run

PROMPTS = 384
FEW, MANY = 4, 20
COMMON = ("--method.every=3", "--training.steps=90", "--optimizer.learning_rate=0.0005")


@dataclass(frozen=True)
class Arm:
    """A way to make the student: its name, what it is, and its recipe with flags."""

    name: str
    says: str
    recipe: str
    flags: tuple[str, ...]


ARMS = (
    Arm(
        "plain",
        "plain distillation (Diff-Instruct)",
        "tiny_sdxl_diff_instruct",
        ("--training.batch_size=32",),
    ),
    Arm(
        "published",
        "Distillation-DPO as intended",
        "tiny_sdxl_distillation_dpo",
        ("--training.batch_size=16",),
    ),
    Arm(
        "crossed",
        "Distillation-DPO, crossed assistants, winners' term alone (ours)",
        "tiny_sdxl_distillation_dpo",
        ("--training.batch_size=16", "--method.assistants=crossed", "--method.losers=0"),
    ),
)


def settings(steps: int) -> SamplingSettings:
    """Return how images are drawn: without guidance."""
    return SamplingSettings(num_inference_steps=steps, guidance_scale=1.0)


def base(prompts: int) -> Row:
    """Return the row of the base, in few and in many steps."""
    asked = {"prompts": prompts, "steps": [FEW, MANY]}
    found = record.known("fewstep-base", asked)
    if found is None:
        pipeline = load(ModelConfig("tiny:sdxl")).pipeline
        rows = {str(steps): scores(pipeline, "test", prompts, settings(steps)) for steps in (FEW, MANY)}
        found = record.keep("fewstep-base", asked, {"scores": rows})
    return found


def make(arm: Arm, seed: int, prompts: int) -> Row | None:
    """Return the row of an arm and a seed, made if it is missing; None if another process makes it."""
    run = arms.seeded(read_run(arm.recipe, [*COMMON, *arm.flags]), seed)
    asked = {
        "method": build(run.method),
        "rollout": run.rollout,
        "lora": run.model.lora,
        "optimizer": run.optimizer,
        "batch_size": run.training.batch_size,
        "steps": run.training.steps,
        "prompts": prompts,
    }
    name = f"fewstep-{arm.name}-{seed}"

    def facts() -> Row:
        with trained(name, run) as (result, pipeline, seconds):
            row = {"arm": arm.name, "seed": seed, "seconds": round(seconds, 1), "verdict": result.verdict}
            return row | {"scores": scores(pipeline, "test", prompts, settings(FEW))}

    return arms.row_of(name, asked, facts, lambda row: f"{row['seconds']:.0f} s")


def text(start: Row, rows: Sequence[Row]) -> str:
    """Return the table of every row."""
    few, many = (start["scores"][str(steps)] for steps in (FEW, MANY))
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    lines = [
        "# A student of 4 steps",
        "",
        "`python -m benchmarks.few_step` makes what is missing. Students of the tiny SDXL, whose teacher is "
        f"the base: 4 steps, no guidance, images of {start['asked']['prompts']} held-out captions from the "
        "same noise. Pairs were ordered by the judge; taste and the tiny CLIP were not trained on. Gains "
        "over the base, in 4 steps too, with 95 % intervals, by a bootstrap over captions and seeds.",
        "",
        "| student | judge | gain | taste, gain | tiny CLIP, gain | seeds | steps | CPU s |",
        "|---|---|---|---|---|---|---|---|",
        f"| base in 4 steps | {mean(few[REWARDS[0]]):.3f} | | | | | | |",
        f"| base in 20 steps | {mean(many[REWARDS[0]]):.3f} | "
        f"{shown(over_seeds([[b - a for a, b in zip(few[REWARDS[0]], many[REWARDS[0]], strict=True)]]))} "
        "| | | | | |",
    ]
    by_arm = record.by_arm(rows)
    for arm in ARMS:
        if some := by_arm.get(arm.name):
            cells = [shown(over_seeds([arms.gains(row, few, name) for row in some])) for name in REWARDS]
            judged = mean([mean(row["scores"][REWARDS[0]]) for row in some])
            steps = f"{some[0]['asked']['steps']} of {some[0]['asked']['batch_size']}"
            seconds = mean([row["seconds"] for row in some])
            lines.append(
                f"| {arm.name}: {arm.says} | {judged:.3f} | {' | '.join(cells)} | {len(some)} | {steps} "
                f"| {seconds:.0f} |"
            )
    lines += ["", "| judge, against plain distillation | difference | |", "|---|---|---|"]
    plain = {row["seed"]: row for row in by_arm.get("plain", [])}
    for arm in ARMS[1:]:
        pairs = [(row, plain[row["seed"]]) for row in by_arm.get(arm.name, []) if row["seed"] in plain]
        if pairs:
            found = over_seeds([arms.gains(row, other["scores"], REWARDS[0]) for row, other in pairs])
            lines.append(f"| {arm.name} | {shown(found)} | {verdict(found, 'better', 'worse')} |")
    lines += ["", arms.made_on([start, *rows])]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is requested and missing."""

    def page(prompts: int) -> str:
        return text(base(prompts), [row for row in record.rows("fewstep-") if "arm" in row])

    arms.main("few_step", __doc__, ARMS, make, page, prompts=PROMPTS, argv=argv)


if __name__ == "__main__":
    main()
