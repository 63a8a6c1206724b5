"""How the gain on the tiny SDXL depends on the number of pairs, on wrong labels, on guidance and sampler.

    python -m benchmarks.sweeps                          # every arm, five seeds
    python -m benchmarks.sweeps --arms sft,dpo --seeds 1

An arm is a shipped recipe with flags, trained for the recipe's steps; a row is an arm and a seed, a file
under ``benchmarks/rows``; ``sweeps.md`` is made of all rows that are there. Images are of test captions, from
the noise of the base's, which is sampled with the same settings: a gain is never one of guidance or steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers

from benchmarks import arms, record, tiny_world
from benchmarks.record import Row, over_seeds, shown
from diffalign.config.schema import ModelConfig
from diffalign.evaluation.drawing.sampling import SamplingSettings
from diffalign.models.loading import load
from diffalign.runs.demo import REWARDS, SAMPLING

PROMPTS, SEEDS = 192, 5
JUDGE = REWARDS[0]


@dataclass(frozen=True)
class Drawing:
    """A way to sample images: settings, and the class of the scheduler (None: the pipeline's)."""

    says: str
    settings: SamplingSettings
    scheduler: str | None = None


SAME = Drawing("the leaderboard's: DDIM, 20 steps, no guidance", SAMPLING)
DRAWINGS = {
    "same": SAME,
    "guidance-2": Drawing("guidance 2", replace(SAMPLING, guidance_scale=2.0)),
    "guidance-4": Drawing("guidance 4", replace(SAMPLING, guidance_scale=4.0)),
    "guidance-7": Drawing("guidance 7", replace(SAMPLING, guidance_scale=7.0)),
    "steps-8": Drawing("8 steps", replace(SAMPLING, num_inference_steps=8)),
    "steps-50": Drawing("50 steps", replace(SAMPLING, num_inference_steps=50)),
    "dpm": Drawing("DPM-Solver++, 20 steps", SAMPLING, "DPMSolverMultistepScheduler"),
    "euler-a": Drawing("Euler ancestral, 20 steps", SAMPLING, "EulerAncestralDiscreteScheduler"),
}


@dataclass(frozen=True)
class Arm:
    """A trained model: its name, what it is, recipe and flags, and how its images are sampled."""

    name: str
    says: str
    recipe: str
    flags: tuple[str, ...] = ()
    drawings: tuple[str, ...] = ("same",)


SAMPLED = (
    Arm("dpo", "Diffusion-DPO", "dpo", drawings=tuple(DRAWINGS)),
    Arm("sft", "SFT on the winners", "sft", drawings=tuple(DRAWINGS)),
)
FEWER = tuple(
    Arm(f"dpo-{pairs}-pairs", f"Diffusion-DPO, {pairs:,} pairs", "dpo", (f"--data.limit={pairs}",))
    for pairs in (64, 256, 1024)
)
NOISY = (
    ("dpo", "Diffusion-DPO", "dpo", ()),
    ("dpo250", "Diffusion-DPO with the tuned beta, 250", "dpo", ("--method.beta=250",)),
    ("ipo", "IPO", "ipo", ()),
    ("robust", "DPO, robust loss told the share", "dpo",
     ("--method.loss=robust", "--method.loss.label_noise={share}")),
)  # fmt: skip
RIGHT = tuple(
    Arm(f"{name}-right", f"{title}, no label flipped", recipe, flags)
    for name, title, recipe, flags in NOISY[1:3]  # ``dpo`` is among ``SAMPLED``; without flips robust is DPO
)
WRONG = tuple(
    Arm(
        f"{name}-{share:.0%}-wrong".replace("%", ""),
        f"{title}, {share:.0%} of the labels flipped",
        recipe,
        (f"--data.flip_labels={share}", *(flag.format(share=share) for flag in flags)),
    )
    for share in (0.2, 0.4)
    for name, title, recipe, flags in NOISY
)
ARMS = (*SAMPLED, *FEWER, *RIGHT, *WRONG)
TABLES: dict[str, tuple[str, ...]] = {
    "Number of pairs": (*(arm.name for arm in FEWER), "dpo"),
    "Wrong labels": ("dpo", *(arm.name for arm in (*RIGHT, *WRONG))),
}


def scores_of(pipeline: Any, drawings: Sequence[str], prompts: int) -> dict[str, dict[str, list[float]]]:
    """Return the scores of a pipeline's images of test captions, by drawing and reward."""
    kept, found = pipeline.scheduler, {}
    for name in drawings:
        drawing = DRAWINGS[name]
        if drawing.scheduler:
            pipeline.scheduler = getattr(diffusers, drawing.scheduler).from_config(kept.config)
        found[name] = tiny_world.scores(pipeline, "test", prompts, drawing.settings)
        pipeline.scheduler = kept
    return found


def base(prompts: int) -> Row:
    """Return the row of the base, sampled in every way."""
    asked = {"prompts": prompts, "drawings": DRAWINGS}
    with record.lock("sweep-base"):
        found = record.known("sweep-base", asked)
        if found is None:
            pipeline = load(ModelConfig("tiny:sdxl")).pipeline
            found = record.keep("sweep-base", asked, {"scores": scores_of(pipeline, [*DRAWINGS], prompts)})
        return found


def make(arm: Arm, seed: int, prompts: int) -> Row | None:
    """Return the row of an arm and a seed, made if it is missing; None if another process makes it."""
    run = tiny_world.recipe(arm.recipe, arm.flags, seed)
    asked = tiny_world.settings_of(run, "test", prompts, run.training.steps)
    asked["drawings"] = {name: DRAWINGS[name] for name in arm.drawings}
    name = f"sweep-{arm.name}-{seed}"

    def facts() -> Row:
        with tiny_world.trained(name, run) as (result, pipeline, seconds):
            return {
                "arm": arm.name,
                "seed": seed,
                "seconds": round(seconds, 1),
                "verdict": result.verdict,
                "scores": scores_of(pipeline, arm.drawings, prompts),
            }

    return arms.row_of(
        name, asked, facts, lambda row: shown(over_seeds([gained(row, base(prompts), arm.drawings[0])]))
    )


def gained(row: Row, start: Row, drawing: str = "same", reward: str = JUDGE) -> list[float]:
    """Return the gains of a row over the base's row ``start`` by prompt, sampled alike."""
    return arms.gains({"scores": row["scores"][drawing]}, start["scores"][drawing], reward)


def text(prompts: int) -> str:
    """Return the page, of all rows that are there."""
    start, by_arm = base(prompts), record.by_arm(record.rows("sweep-"))
    lines = [
        "# Pairs, wrong labels, guidance and samplers",
        "",
        "`python -m benchmarks.sweeps` makes what is missing. Recipes of the tiny SDXL, trained for their "
        f"own steps (60 of 64 pairs). Gains are of images of {prompts} test captions over the base's, "
        "sampled with the same settings from the same noise, with 95 % intervals by a bootstrap over "
        "captions and seeds. The judge ordered the labels; taste and the tiny CLIP are held out.",
        "",
    ]
    says = {arm.name: arm.says for arm in ARMS}
    missing = [arm.name for arm in ARMS if arm.name not in by_arm]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}.", ""]
    for title, names in TABLES.items():
        if sum(name in by_arm for name in names) < 2:
            continue
        lines += [
            f"## {title}",
            "",
            "| | judge | taste | tiny CLIP | seeds |",
            "|---|---|---|---|---|",
        ]
        for name in names:
            if some := by_arm.get(name):
                lines.append(f"| {says[name]} | {' | '.join(_cells(some, start))} | {len(some)} |")
        lines.append("")
    lines += [*_sampling(by_arm, start), ""]
    return "\n".join([*lines, arms.made_on([start, *(r for some in by_arm.values() for r in some)]), ""])


def _cells(rows: Sequence[Row], start: Row, drawing: str = "same") -> list[str]:
    return [shown(over_seeds([gained(row, start, drawing, name) for row in rows])) for name in REWARDS]


def _heading(arm: Arm, seeds: int) -> str:
    return f"{arm.says}: gain ({seeds} seed{'s' * (seeds != 1)})"


def _sampling(by_arm: Mapping[str, list[Row]], start: Row) -> list[str]:
    """Return the table of ways to sample: the base's judge, and the gains of the arms that have them all."""
    some = [arm for arm in SAMPLED if arm.name in by_arm]
    lines = [
        "## Guidance, steps and sampler",
        "",
        "The models are the same in all lines; the base of a line is sampled as the line says.",
        "",
        f"| sampled with | base | {' | '.join(_heading(arm, len(by_arm[arm.name])) for arm in some)} |",
        "|---|---|" + "---|" * len(some),
    ]
    for name, drawing in DRAWINGS.items():
        values = start["scores"][name][JUDGE]
        cells = [_cells(by_arm[arm.name], start, name)[0] for arm in some]
        lines.append(f"| {drawing.says} | {' | '.join([f'{sum(values) / len(values):.3f}', *cells])} |")
    return lines


main = partial(arms.main, "sweeps", __doc__, ARMS, make, text, prompts=PROMPTS)

if __name__ == "__main__":
    main()
