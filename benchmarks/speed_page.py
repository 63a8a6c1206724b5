"""The page of the speed benchmark, made of the rows that are there."""

from collections.abc import Callable, Sequence
from statistics import median

from benchmarks import record
from benchmarks.record import Row
from benchmarks.speed_arms import SUBJECTS, Subject
from diffalign.utils.files import write_atomic

GIB = 2**30


def write() -> None:
    """Write ``benchmarks/speed.md``."""
    rows = record.rows("speed-")
    parts = [head(rows)]
    mine = [row for row in rows if "tool" in row["asked"]]
    for subject in SUBJECTS.values():
        if some := [row for row in mine if row["asked"].get("dtype", "float32") == subject.dtype]:
            parts += [against(some, subject), beside(some)]
    if real := [row for row in rows if "size" in row["asked"]]:
        parts.append(sizes(real))
    write_atomic(record.HERE / "speed.md", "\n".join(part for part in parts if part))


def step(row: Row, column: int, first: bool = False) -> float:
    """Return the mean seconds of a step.

    Args:
        column: 0, wall time; 1, processor time; 2, processor time inside the optimizer.
        first: whether all steps are counted, from the making of the optimizer on; else those after
            ``row["warm"]``.
    """
    stamps, begin = row["stamps"], 0 if first else row["warm"]
    return float((stamps[-1][column] - stamps[begin][column]) / (len(stamps) - 1 - begin))


def pairs_a_second(row: Row, column: int = 1) -> float:
    """Return the pairs a second of processor time (1) or wall time (0)."""
    return float(row["asked"]["batch"] / step(row, column))


MEASURES: Sequence[tuple[str, Callable[[Row], float], int]] = (
    ("CPU s a step", lambda row: step(row, 1), 2),
    ("first included", lambda row: step(row, 1, first=True), 2),
    ("wall s a step", lambda row: step(row, 0), 2),
    ("CPU s of the process", lambda row: float(row["whole_processor"]), 1),
    ("peak GiB", lambda row: row["peak"] / GIB, 2),
    ("while training", lambda row: row["peak_training"] / GIB, 2),
    ("pairs a CPU s", pairs_a_second, 3),
    ("TFLOP/s", lambda row: pairs_a_second(row) * row["flops_per_pair"] / 1e12, 3),
    ("of a product", lambda row: pairs_a_second(row) * row["flops_per_pair"] / row["matmul"], 2),
)


def spread(values: Sequence[float], digits: int) -> str:
    """``1.20 [1.10, 1.30]``: median, least and most."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def head(rows: Sequence[Row]) -> str:
    """Return the title and what was measured."""
    dates = sorted(row["date"] for row in rows)
    return f"""# How fast a step is

`python -m benchmarks.speed --against train_diffusion_dpo_sdxl.py` makes rows that are missing, {dates[0]} to
{dates[-1]}, {rows[0]["machine"]}, torch {rows[0]["versions"]["torch"]}, diffusers
{rows[0]["versions"]["diffusers"]}. Figures are median [least, most] of the repetitions.
"""


def by_arm(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of each arm and tool, by repetition."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["repetition"]):
        found.setdefault((row["asked"]["arm"], row["asked"]["tool"]), []).append(row)
    return found


def against(rows: Sequence[Row], subject: Subject) -> str:
    """Return the tables of arms, ours and the script's, and their ratios."""
    arms = by_arm(rows)
    asked = rows[0]["asked"]
    lines = [
        f"## Against diffusers' script, on a CPU: {subject.title}",
        "",
        f"{subject.says}, "
        f"{asked['resolution']} px, pairs a step: {asked['batch']}, {asked['steps']} steps, rank 16, "
        f"{subject.dtype}, {asked['threads']} thread. Theirs is `train_diffusion_dpo_sdxl.py` as it is, "
        "on the same folder and table. Repetitions alternate, ours and theirs. Other work ran on the "
        "machine: processor time is what compares, and wall time shows how busy it was.",
        "",
        "A step counts from the end of one optimizer step to the end of the next, without the first; "
        "*first included*, from the making of the optimizer. Ours fills its cache before that, which is in "
        "*CPU s of the process* with imports, loading and saving, each pair seen once. FLOPs are those of "
        "the policy's forward and backward and the reference's forward, for both tools alike; *of a product* "
        "is their share of the speed of a product of matrices, by processor time.",
        "",
        f"| arm | tool | {' | '.join(name for name, _, _ in MEASURES)} | n |",
        f"|---|---|{'---|' * len(MEASURES)}---|",
    ]
    for (arm, tool), some in sorted(arms.items(), key=lambda item: (item[1][0]["beside"], item[0])):
        cells = [spread([measure(row) for row in some], digits) for _, measure, digits in MEASURES]
        who = "ours" if tool == "ours" else "diffusers"
        lines.append(f"| {arm}: {some[0]['says']} | {who} | {' | '.join(cells)} | {len(some)} |")
    lines += [
        "",
        "| ours over theirs | CPU a step | first included | CPU of the process | peak | while training |",
    ]
    lines.append("|---|---|---|---|---|---|")
    counterparts = {arm.name: arm.against or arm.name for arm in subject.arms}
    for (arm, tool), ours in arms.items():
        name = counterparts[arm]
        if tool == "ours" and (theirs := arms.get((name, "script"))):
            which = arm if name == arm else f"{arm}, over the script's {name}"
            lines.append(f"| {which} | {' | '.join(ratios(ours, theirs, (0, 1, 3, 4, 5)))} |")
    lines += [
        "",
        "The script trains LoRA alone; all weights have no counterpart in it. Nearly all of our step is the "
        "network ([profile.md](profile.md)): a step that asks the policy and the reference about fresh noise "
        "cannot be much shorter than *lora*; *bank* leaves out the reference.",
        "",
    ]
    return "\n".join(lines)


def ratios(ours: Sequence[Row], theirs: Sequence[Row], which: Sequence[int]) -> list[str]:
    """Return the ratios of measures, each of a repetition to its fellow, with their spread."""
    measures = [MEASURES[index][1] for index in which]
    pairs = fellows(ours, theirs)
    return [spread([measure(a) / measure(b) for a, b in pairs], 2) for measure in measures]


def fellows(ours: Sequence[Row], theirs: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the pairs of rows of the same repetition."""
    by_repetition = {row["repetition"]: row for row in theirs}
    return [(row, by_repetition[row["repetition"]]) for row in ours if row["repetition"] in by_repetition]


def beside(rows: Sequence[Row]) -> str:
    """Return the table of arms that differ from another one in one thing."""
    arms = by_arm(rows)
    lines = [
        "## One thing at a time",
        "",
        "Our own runs, each over the one that it differs from in one thing; below 1 is less.",
        "",
        "| | over | CPU a step | CPU of the optimizer | peak while training |",
        "|---|---|---|---|---|",
    ]
    known = len(lines)
    for (_, tool), some in arms.items():
        base = arms.get((some[0]["beside"], "ours"))
        if tool != "ours" or not base:
            continue
        inside = spread([step(a, 2) / step(b, 2) for a, b in fellows(some, base)], 2)
        cpu, peak = ratios(some, base, (0, 5))
        lines.append(f"| {some[0]['says']} | {some[0]['beside']} | {cpu} | {inside} | {peak} |")
    return "\n".join([*lines, ""]) if len(lines) > known else ""


def sizes(rows: Sequence[Row]) -> str:
    """Return the table of real sizes."""
    lines = [
        "## Real sizes",
        "",
        "`python -m benchmarks.speed --sizes ...`: random weights made on the device, latents drawn there, "
        "bfloat16; the first two steps are not counted. *Share* is of the speed of a product of matrices.",
        "",
        "| size | arm | device | pairs a step | pairs a second | TFLOP/s | share | peak GiB | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["asked"]["size"], row["asked"]["arm"]), []).append(row)
    for (name, arm), some in groups.items():
        asked = some[0]["asked"]
        if failed := [row for row in some if "failed" in row]:
            lines.append(
                f"| {name} | {arm} | {asked['device']} | {asked['batch']} | {failed[0]['failed']} | | | | |"
            )
            continue
        speed = [pairs_a_second(row, 0) for row in some]
        flops = [v * row["flops_per_pair"] for v, row in zip(speed, some, strict=True)]
        share = [v / row["matmul"] for v, row in zip(flops, some, strict=True)]
        lines.append(
            f"| {name} | {arm} | {asked['device']} | {asked['batch']} | {spread(speed, 2)} | "
            f"{spread([v / 1e12 for v in flops], 1)} | {spread(share, 2)} | "
            f"{spread([row['peak_training'] / GIB for row in some], 2)} | {len(some)} |"
        )
    return "\n".join([*lines, ""])
