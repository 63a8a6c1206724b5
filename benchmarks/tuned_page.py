"""The page ``benchmarks/tuned.md``: methods with the settings of their recipes and with equal tuning."""

from collections.abc import Iterator, Sequence
from itertools import combinations, groupby

from benchmarks import tuning
from benchmarks.record import Row, between, over_seeds, ranks, shown
from benchmarks.tables import TITLES, flags_of, others_of
from diffalign.evaluation.measuring.statistics import holm

LEVEL = 0.05
ABOUT = (
    "`python -m benchmarks.methods --world {world} --methods {methods} --tuned` makes what is missing. "
    "*Recipe*: the rows of the table of the recipes' settings in [methods.md](methods.md). *Tuned*: {trials} "
    "trials of each method on {prompts} validation prompts (strengths {strengths} times the recipe's, then "
    "learning rates {rates} times at the best strength; a method without a strength: {alone}), the best "
    "{finalists} again with {seeds} further seeds each, the one with the highest mean over its seeds trained "
    "with five seeds. Both are measured on the same test prompts and noise, at the same compute; "
    "trials have seeds that no row has. Ranks are among the methods of this page, with 95 % ranges over "
    "resampled prompts and seeds. The difference is paired in prompts and unpaired in seeds."
)
WHY = (
    "The settings of the recipes were found with unequal effort: most had one trial, the betas of IPO and "
    "DMPO were lowered step by step, and DPO kept the beta of the demo. A method that was tuned stands above "
    "one that was not, whatever their losses. Where the interval of *tuned - recipe* is above 0, the old "
    "place of a method was a matter of tuning. Where it is below 0, the choice was worse than the recipe. "
    "The best of eight looks better than it is: *its trials* are the gains on validation prompts by seed, of "
    "which the first was the highest of eight, or nearly so, and the others were not."
)
CURVES = "Gain of every trial against its setting (`python -m benchmarks.figures --only sensitivity`):"


REWARDS = {"taste": "taste", "tiny_clip": "tiny CLIP", "pattern_taste": "taste"}
HELD_OUT = {
    ("taste", "tiny_clip"): "Taste and the tiny CLIP are not trained on",
    ("pattern_taste",): "Taste is not trained on",
}


def text(rows: Sequence[Row], worlds: Sequence[str]) -> str:
    """Return the page; it says so where no method of a world is tuned yet."""
    lines = ["# What equal tuning changes", ""]
    for world in worlds:
        both = {name: (recipe, tuned) for name, recipe, tuned in _pairs(rows, world)}
        if both:
            lines += _world(world, both)
            left = sorted({row["method"] for row in rows if row["world"] == world} - both.keys())
            lines += [f"Not tuned yet: {', '.join(f'`{name}`' for name in left) or 'none'}.", ""]
    if len(lines) == 2:
        return "\n".join([*lines, "No method is tuned yet.", ""])
    return "\n".join([*lines, CURVES, "", "![Gains of all trials](../docs/figures/sensitivity.png)", ""])


def _pairs(rows: Sequence[Row], world: str) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """Yield the methods of a world that have rows of both kinds."""
    here = [row for row in rows if row["world"] == world]
    for name, group in groupby(here, key=lambda row: row["method"]):
        every = list(group)
        tuned = [row for row in every if "trials" in row]
        recipe = [row for row in every if "trials" not in row]
        if tuned and recipe:
            yield name, recipe, tuned


def _world(world: str, both: dict[str, tuple[list[Row], list[Row]]]) -> list[str]:
    names = sorted(both, key=lambda name: -over_seeds(_gains(both[name][1])).value)
    places = [ranks([_gains(both[name][kind]) for name in names]) for kind in (0, 1)]
    lines = [
        f"## {TITLES[world]}",
        "",
        ABOUT.format(
            world=world,
            methods=",".join(names),
            trials=tuning.TRIALS,
            finalists=tuning.FINALISTS,
            seeds=len(tuning.FINAL_SEEDS),
            prompts=tuning.PROMPTS,
            strengths=_listed(tuning.STRENGTHS),
            rates=_listed(tuning.RATES),
            alone=f"learning rates {_listed(tuning.RATES_ALONE)} times",
        ),
        "",
        WHY,
        "",
        "| method | recipe | rank | tuned | rank | tuned - recipe | tuned settings | its trials | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for i, name in enumerate(names):
        recipe, tuned = both[name]
        cells = [
            name,
            shown(over_seeds(_gains(recipe))),
            "{} to {}".format(*places[0][i]),
            shown(over_seeds(_gains(tuned))),
            "{} to {}".format(*places[1][i]),
            shown(between(_gains(tuned), _gains(recipe))[0]),
            flags_of(tuned[0]["flags"]),
            ", ".join(f"{gain:+.3f}" for gain in tuning.gains_of(world, name, tuned[0]["flags"])),
            f"{len(recipe)}, {len(tuned)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_beside(names, both), "", *_differences(names, both), ""]


def _beside(names: Sequence[str], both: dict[str, tuple[list[Row], list[Row]]]) -> list[str]:
    """Return the table of what stands beside the gain: held-out rewards, diversity and drift."""
    others = others_of(both[names[0]][1][0])
    lines = [
        f"What else moves. {HELD_OUT[others]}; *diversity* and *drift* as in "
        "[methods.md](methods.md). An older row has no diversity and drift, and no gains by prompt of the "
        "held-out rewards: their mean stands without an interval.",
        "",
        f"| method | settings | {' | '.join(REWARDS[name] for name in others)} | diversity | drift, nats |",
        "|---|---|---|---|" + "---|" * len(others),
    ]
    for name in names:
        for kind, rows in zip(("recipe", "tuned"), both[name], strict=True):
            rewards = [_held_out(rows, reward) for reward in others]
            figures = [
                f"{sum(row['figures'][key] for row in rows) / len(rows):.2f}"
                if all(key in row["figures"] for row in rows)
                else ""
                for key in ("diversity", "drift")
            ]
            lines.append(f"| {' | '.join([name, kind, *rewards, *figures])} |")
    return lines


def _held_out(rows: Sequence[Row], reward: str) -> str:
    """Return the mean gain of a held-out reward, with its interval if all rows have gains by prompt."""
    if all("other gains" in row for row in rows):
        return shown(over_seeds([row["other gains"][reward] for row in rows]))
    return f"{sum(row['rewards'][reward]['gain'][0] for row in rows) / len(rows):+.3f}"


def _differences(names: Sequence[str], both: dict[str, tuple[list[Row], list[Row]]]) -> list[str]:
    """Return which pairs of methods are shown to differ, of all pairs, with Holm's correction."""
    lines = []
    for kind, title in enumerate(("With the recipes' settings", "Tuned")):
        gains = {name: _gains(both[name][kind]) for name in names}
        best_first = sorted(names, key=lambda name: -over_seeds(gains[name]).value)
        compared = [(a, b, *between(gains[a], gains[b])) for a, b in combinations(best_first, 2)]
        adjusted = holm([p for *_, p in compared])
        differ = [
            f"`{a}` over `{b}` {shown(gap)}"
            for (a, b, gap, _), p in zip(compared, adjusted, strict=True)
            if p < LEVEL
        ]
        lines.append(
            f"- {title}, {len(differ)} of {len(compared)} pairs are shown to differ (Holm's correction over "
            f"all of them, {LEVEL:.0%}): {'; '.join(differ) or 'none'}."
        )
    return lines


def _gains(rows: Sequence[Row]) -> list[list[float]]:
    return [row["gains"] for row in rows]


def _listed(factors: Sequence[float]) -> str:
    return ", ".join(f"{factor:g}" for factor in sorted(factors))
