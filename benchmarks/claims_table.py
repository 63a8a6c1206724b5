"""The Markdown of claims: comparisons with intervals, and computed verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.claims_list import Arm, Claim, Comparison
from benchmarks.record import Row, over_seeds, shown, verdict
from diffalign.evaluation.measuring.statistics import Estimate

MIB = 2**20
SUPPORTED, REFUTED, OPEN = "supported", "not supported", "no difference shown"
ONE_SEED = "one seed: open"

HOW = (
    "`python -m benchmarks.claims` makes what is missing. Differences are of the mean gain over the base "
    "(height on the plane, judge on the tiny SDXL), paired by seed, prompt and noise, with 95 % intervals"
    " by a bootstrap over prompts and seeds. A claim is *supported* where every comparison that decides "
    "(bold) has its interval on the claim's side of 0, *not supported* where one lies on the other side. A "
    "gain of one seed decides nothing: its interval is over prompts alone and leaves out how seeds differ. "
    "Memory is counted once, of one step, and has no interval. "
    "On the plane, arms that are compared by their gain have each the beta that gives the largest gain "
    "with under 3 % of the mass off the support (seven betas on a seed of its own): otherwise a gain says"
    " how weak a beta is. On the tiny SDXL the recipes' settings are used."
)


@dataclass(frozen=True)
class Difference(Estimate):
    """A difference of two arms, and how many seeds it is the mean of."""

    seeds: int


def text(claims: Sequence[Claim], rows: Mapping[str, Row]) -> str:
    """Return the text of ``claims.md``."""
    lines = [
        "# Claims of the papers, tested",
        "",
        HOW,
        "",
    ]
    for claim in claims:
        results = [(c, difference(c, rows)) for c in claim.comparisons]
        lines += [f"## {claim.title} {claim.says}: {outcome(results)}", ""]
        lines += [claim.note, ""] if claim.note else []
        lines += [
            "| world | comparison | a | b | a - b | | steps | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_line(c, d, rows) for c, d in results]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def outcome(results: Sequence[tuple[Comparison, Difference | None]]) -> str:
    """Return the verdict over all deciding comparisons, and the number of those without rows or seeds."""
    verdicts = [_verdict(c, d) for c, d in results if c.decides and d is not None]
    missing = sum(c.decides and d is None for c, d in results)
    if not verdicts:
        return "not tested yet"
    alone, count = verdicts.count(ONE_SEED), missing + len(verdicts)
    word = REFUTED if REFUTED in verdicts else OPEN if {OPEN, ONE_SEED} & {*verdicts} else SUPPORTED
    left = [f"{missing} of {count} comparisons not made yet"] if missing else []
    left += [f"{alone} of {count} comparisons of one seed"] if alone else []
    return word + (f" ({', '.join(left)})" if left else "")


def _verdict(comparison: Comparison, estimate: Difference) -> str:
    if estimate.seeds == 1 and not comparison.counted:
        return ONE_SEED
    sides = (REFUTED, SUPPORTED) if comparison.lower else (SUPPORTED, REFUTED)
    return verdict(estimate, *sides)


def _seeds(comparison: Comparison, rows: Mapping[str, Row]) -> list[int]:
    """Return the seeds that all arms of a comparison have."""
    return [s for s in range(100) if all(f"claim-{arm.name}-{s}" in rows for arm in comparison.arms)]


def difference(comparison: Comparison, rows: Mapping[str, Row]) -> Difference | None:
    """Return the estimate of a - b over their common seeds (of a, if there is no b); None without seeds."""
    seeds = _seeds(comparison, rows)
    if not seeds:
        return None
    values = [
        [np.asarray(_values(arm, rows[f"claim-{arm.name}-{s}"])) for arm in comparison.arms] for s in seeds
    ]
    mean = over_seeds([both[0] - both[1] if len(both) == 2 else both[0] for both in values])
    return Difference(mean.value, mean.low, mean.high, len(seeds))


def _values(arm: Arm, row: Row) -> Sequence[float]:
    if arm.value == "memory":
        return [sum(row["memory"].values()) / MIB]
    values: Sequence[float] = row["gains"] if arm.value == "gain" else row["rises"][arm.value]
    return values


def _line(comparison: Comparison, estimate: Difference | None, rows: Mapping[str, Row]) -> str:
    first = rows.get(f"claim-{comparison.a.name}-0", {})
    label = f"**{comparison.label}**" if comparison.decides else comparison.label
    cells = [comparison.a.world, label, _cell(comparison.a, rows)]
    cells.append(_cell(comparison.b, rows) if comparison.b else "the base")
    digits = 1 if comparison.a.value in ("memory", "chosen", "rejected") else 3
    if estimate is None:
        cells += ["", "not made yet", str(first.get("steps", "")), "0"]
    else:
        said = f"{estimate.value:+.{digits}f}" if comparison.counted else shown(estimate, digits)
        cells += [said, _verdict(comparison, estimate), str(first.get("steps", "")), str(estimate.seeds)]
    return f"| {' | '.join(cells)} |"


def _cell(arm: Arm, rows: Mapping[str, Row]) -> str:
    made = [rows[name] for s in range(100) if (name := f"claim-{arm.name}-{s}") in rows]
    if not made:
        return arm.title
    mean = float(np.mean([np.mean(_values(arm, row)) for row in made]))
    cell = f"{arm.title}: {mean:.1f}" if arm.value != "gain" else f"{arm.title}: {mean:+.3f}"
    if arm.value == "memory":
        weights, held = made[0]["memory"]["weights"] / MIB, made[0]["calls"]["held"]
        cell += f" (weights {weights:.1f}; {held:.0f} held samples)"
    return cell
