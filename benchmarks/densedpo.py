"""Compare DenseDPO with its baselines on moving shapes: quality and motion.

    python -m benchmarks.densedpo                  # every arm, three seeds
    python -m benchmarks.densedpo --arms dense     # one arm

An arm with a seed is a row, a file under ``benchmarks/rows``: an interrupted run resumes, and concurrent
processes share the rows. ``benchmarks/densedpo.md`` is made from all rows.
"""

from benchmarks import arms, record
from benchmarks.record import Row, over_seeds, shown, verdict
from benchmarks.video_world import (
    ARMS,
    GUIDANCE,
    MEASURED,
    PAIRS,
    SEGMENT,
    STEPS,
    VideoArm,
    measured,
    settings_of,
)
from diffalign.evaluation.measuring.statistics import Estimate

PROMPTS = 192
COLUMNS = {
    "video_content": "content (trained on)",
    "video_motion": "motion as told",
    "dynamics": "speed, px/s",
    "dynamic_degree": "dynamic degree",
}
HOW = (
    "`python -m benchmarks.densedpo` makes what is missing. The tiny Wan draws moving shapes; in the clips "
    "that it was trained on, the faster a thing moves the likelier it has a defect for a second (its shape "
    "or colour changes, or it halts), so that slow videos are better ones to whoever looks at quality alone. "
    "Pairs are of two sources, {pairs} of each kind. *True* ones are renders, labelled by their defects: two "
    "clips of a caption, or two of one motion. The others are drawn by the base itself ({steps} steps, "
    "guidance {guidance:g}), independently or from one noised clip (guided), and labelled every {segment:g} "
    "s by the content judge, which sees number, colours and shapes and no motion; a label a pair is the "
    "majority. All arms take as many steps of as many pairs, and those of a source have been tuned alike. "
    "Gains over the base are on {prompts} held-out captions with the same noise, {measured} steps; 95 % "
    "intervals by a bootstrap over prompts and seeds. Speed is that of the caption's things, whichever way "
    "they go; the dynamic degree is `diffalign.evaluation.measuring.motion`'s, short sides a second of the "
    "fastest 5 % of the pixels."
)
QUESTIONS = (
    ("True renders: vanilla DPO raises quality", "video_content", "vanilla-true", None),
    ("True renders: DenseDPO raises quality", "video_content", "dense-true", None),
    ("True renders: vanilla DPO loses motion", "dynamics", None, "vanilla-true"),
    ("True renders: DenseDPO keeps more motion than vanilla DPO", "dynamics", "dense-true", "vanilla-true"),
    ("Vanilla DPO raises quality", "video_content", "vanilla", None),
    ("DenseDPO raises quality", "video_content", "dense", None),
    ("Vanilla DPO loses motion", "dynamics", None, "vanilla"),
    ("DenseDPO keeps more motion than vanilla DPO", "dynamics", "dense", "vanilla"),
    ("DenseDPO raises quality more than vanilla DPO", "video_content", "dense", "vanilla"),
    ("DenseDPO raises quality more than one label a guided pair", "video_content", "dense", "structural"),
    ("All pairs are better than a third of them", "video_content", "dense", "dense-third"),
)


def make(arm: VideoArm, seed: int, prompts: int) -> Row | None:
    """Return a row, read or made; None while another process makes it."""
    name = f"video-{arm.name}-{seed}"
    facts = lambda: {"arm": arm.name, "seed": seed, **measured(arm, seed, prompts)}  # noqa: E731
    return arms.row_of(name, settings_of(arm, seed, prompts), facts, arms.rewarded)


def difference(rows: dict[str, list[Row]], value: str, a: str | None, b: str | None) -> Estimate | None:
    """Return the gain of arm a over arm b (None: the base), paired by seed and prompt; None without rows."""
    needed = [name for name in (a, b) if name]
    if any(name not in rows for name in needed):
        return None
    seeds = set.intersection(*({row["seed"] for row in rows[name]} for name in needed))
    table = []
    for seed in sorted(seeds):
        one, other = (
            next((row["gains"][value] for row in rows.get(name or "", []) if row["seed"] == seed), None)
            for name in (a, b)
        )
        count = len(one or other or [])
        first, second = one or [0.0] * count, other or [0.0] * count
        table.append([x - y for x, y in zip(first, second, strict=True)])
    return over_seeds(table) if table else None


def text(rows: list[Row]) -> str:
    """Return the text of ``densedpo.md``."""
    by_arm = record.by_arm(rows)
    facts = {"pairs": PAIRS, "steps": STEPS, "measured": MEASURED, "guidance": GUIDANCE, "segment": SEGMENT}
    lines = ["# DenseDPO on the tiny video world", ""]
    lines += [HOW.format(**facts, prompts=rows[0]["asked"]["prompts"] if rows else PROMPTS), ""]
    lines += [
        f"| arm | {' | '.join(COLUMNS.values())} | seeds | steps |",
        "|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    if rows:
        base = [f"{rows[0]['rewards'][name]['base']:.3f}" for name in COLUMNS]
        lines.append(f"| base | {' | '.join(base)} | | |")
    for arm in ARMS:
        group = by_arm.get(arm.name, [])
        if group:
            cells = [shown(over_seeds([row["gains"][c] for row in group])) for c in COLUMNS]
            steps = f"{group[0]['asked']['steps']} of {group[0]['asked']['batch_size']}"
            lines.append(f"| {arm.name}: {arm.says} | {' | '.join(cells)} | {len(group)} | {steps} |")
    lines += ["", "| is it so? | difference | |", "|---|---|---|"]
    for says, value, a, b in QUESTIONS:
        gain = difference(by_arm, value, a, b)
        word = "not tested yet" if gain is None else verdict(gain, "supported", "not supported")
        lines.append(f"| {says} | {'' if gain is None else shown(gain)} | {word} |")
    if rows:
        lines += ["", arms.made_on(rows)]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Make every row that is requested and missing."""
    arms.main(
        "densedpo", __doc__, ARMS, make, lambda _: text(record.rows("video-")), prompts=PROMPTS, argv=argv
    )


if __name__ == "__main__":
    main()
