"""Rollouts of the tiny Wan: does a policy that samples its own videos learn what a judge of them wants?

    python -m benchmarks.video_rollouts             # every row that is missing
    python -m benchmarks.video_rollouts --seeds 1

A row is an arm and a seed, a file under ``benchmarks/rows``; ``video_rollouts.md`` is made of all rows that
are there. Processes started side by side share the rows out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import arms, record
from benchmarks.densedpo import COLUMNS
from benchmarks.record import Row, over_seeds, shown, verdict
from benchmarks.video_world import GUIDANCE, MEASURED, MODEL, trained
from diffalign.evaluation.drawing.pipeline import fingerprint
from diffalign.methods import build
from diffalign.models.loading import load
from diffalign.runs.validate import read_run

PROMPTS = 96
PREFIX = "video_rollout-"  # of the rows; those of benchmarks.densedpo are video-*


@dataclass(frozen=True)
class Arm:
    """What is trained: its name, what it is, and its recipe with flags."""

    name: str
    says: str
    recipe: str
    flags: tuple[str, ...] = ()


ARMS = (
    Arm("nft-content", "DiffusionNFT by the judge of number, colours and shapes", "tiny_wan_diffusion_nft"),
)
TRAINED = {"nft-content": "video_content"}


def make(arm: Arm, seed: int, prompts: int) -> Row | None:
    """Return the row of an arm and a seed, read or made; None while another process makes it."""
    run, name = arms.seeded(read_run(arm.recipe, arm.flags), seed), f"{PREFIX}{arm.name}-{seed}"
    asked = {
        "method": build(run.method),
        "rollout": run.rollout,
        "lora": run.model.lora,
        "optimizer": run.optimizer,
        "steps": run.training.steps,
        "batch_size": run.training.batch_size * run.training.accumulation,
        "base": fingerprint(load(MODEL).pipeline),
        "prompts": prompts,
        "measured_steps": MEASURED,
    }
    facts = lambda: {"arm": arm.name, "seed": seed, **trained(run, name, prompts)}  # noqa: E731
    return arms.row_of(name, asked, facts, arms.rewarded)


def text(rows: Sequence[Row]) -> str:
    """Return ``video_rollouts.md``."""
    first = rows[0]
    columns = [name.removesuffix(" (trained on)") for name in COLUMNS.values()]
    base = [f"{first['rewards'][name]['base']:.3f}" for name in COLUMNS]
    lines = [
        "# Rollouts of videos on the tiny video world",
        "",
        "`python -m benchmarks.video_rollouts` makes what is missing. The policy is the tiny Wan with LoRA: "
        "it samples videos of moving shapes for the train split's captions, unguided, a judge scores them, "
        "and a round is learnt from once. Gains over the base are on "
        f"{first['asked']['prompts']} held-out captions with the same noise, {MEASURED} steps at guidance "
        f"{GUIDANCE:g}; 95 % intervals by a bootstrap over prompts and seeds. Columns are those of "
        "`densedpo.md`.",
        "",
        f"| arm | {' | '.join(columns)} | trained on | seeds | rounds | videos | CPU s |",
        "|---|" + "---|" * (len(columns) + 5),
        f"| base | {' | '.join(base)} | | | | | |",
    ]
    by_arm = record.by_arm(rows)
    for arm in ARMS:
        if not (some := by_arm.get(arm.name)):
            continue
        asked, rollout = some[0]["asked"], some[0]["asked"]["rollout"]["RolloutConfig"]
        each = rollout["prompts_per_round"] * rollout["samples"]
        rounds = asked["steps"] * asked["batch_size"] // rollout["prompts_per_round"]
        cells = [shown(over_seeds([row["gains"][c] for row in some])) for c in COLUMNS]
        seconds = sum(row["seconds"] for row in some) / len(some)
        gain = over_seeds([row["gains"][TRAINED[arm.name]] for row in some])
        word = f"{TRAINED[arm.name]}: {verdict(gain, 'learnt', 'lost')}"
        lines.append(
            f"| {arm.name}: {arm.says} | {' | '.join(cells)} | {word} | {len(some)} | {rounds} "
            f"| {rounds * each:,} | {seconds:.0f} |"
        )
    lines += ["", arms.made_on(rows)]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Make every row that is requested and missing."""
    arms.main(
        "video_rollouts", __doc__, ARMS, make, lambda _: text(record.rows(PREFIX)), prompts=PROMPTS, argv=argv
    )


if __name__ == "__main__":
    main()
