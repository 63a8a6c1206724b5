"""The Markdown of the leaderboard."""

from collections.abc import Sequence
from itertools import groupby

from benchmarks.record import Row, between, over_seeds, ranks, shown, verdict
from benchmarks.tuning import at_edge, trials_of
from diffalign.evaluation.measuring.statistics import holm

TITLES = {
    "plane": "The plane",
    "tiny": "The tiny SDXL",
    "sd3": "The tiny SD3",
    "tiny64": "The tiny SDXL of 64 px",
}
_IMAGES = "Gain of the judge on held-out captions, with the same noise as the base."
_HELD_OUT = {
    "tiny": "Taste and the tiny CLIP were not trained on. ",
    "sd3": "Taste and the tiny CLIP were not trained on. ",
    "tiny64": "Taste was not trained on. ",
}
NOTES = {
    "plane": "Gain of the mean height (of prompt fidelity where marked *) over the base, from the same "
    "starting points. Off support: share of the mass off the ring (the base has 1 %). Distance: to the "
    "closed-form optimum of the same reward (two equal distributions: 0.02). A method that has left the "
    "support, more than 3 %, stands last whatever its gain: settings are those of the tests "
    "(`diffalign/plane/settings.py`), where such a method stops earlier.",
    "tiny": _IMAGES,
    "sd3": _IMAGES,
    "tiny64": _IMAGES + " Patterned scenes: up to three shapes, and statements on fill, colour, shape, "
    "relations and background. Recipes are those of the tiny SDXL.",
}
ONLINE = (
    "The policy samples what it learns from; *images* (points, on the plane; for SPO every candidate line) "
    "is how many. The reward that is measured is also the one that they learn from, but for SPO on the tiny "
    "SDXL: its candidates are judged by the step-aware model, and the judge is not trained on. Samples are "
    "paid for out of the same count, so the budget is larger than that of the table above: the two are not "
    "to be compared. A teacher of DiffusionOPD, a run of Flow-GRPO's recipe, is not counted."
)
GRADIENTS = (
    "The policy is trained by the gradient of the tiny CLIP's score (divided by 10) through its sampler. "
    "*Trained*: the gain of that score, of each seed with its interval. The judge and taste are not trained "
    "on: a gain of the one without a gain of the others is over-optimisation. The budget is that of the "
    "online methods."
)
ABOUT = {"offline": [], "online": [ONLINE, ""], "reward gradients": [GRADIENTS, ""]}
TUNED = (
    "Every method had the same number of trials on validation prompts (`benchmarks/tuning.py`: five "
    "strengths, then three learning rates; without a strength eight learning rates; the three best with two "
    "further seeds) and is trained with the best; then five seeds on the test prompts "
    "([what tuning changed](tuned.md)). "
    "Diversity: how much images of one caption differ, as a share "
    "of the base's; a gain with a fall of it is a gain of sameness. Drift: KL of the process of sampling to "
    "the base's, nats an image. Ranks are over resampled prompts and "
    "seeds; a method whose interval *behind the first* reaches 0 is not shown to be worse than the first."
)
UNTUNED = (
    "These methods were not given the same trials: their settings are those of their recipes, most tried "
    "once. Differences between them can be a matter of tuning."
)
HOW = (
    "`python -m benchmarks.methods` makes what is missing. Intervals are 95 %, of the mean over all seeds, "
    "by a bootstrap over prompts and seeds; the gains of the seeds stand beside. A row of one seed is not "
    "judged: its interval is over prompts alone and leaves out how seeds differ. Compute is counted at the "
    "network: samples forward without gradient (held), forward with gradient (trained) and backward (back), "
    "per step; a forward costs 1, a backward 2, and every method of a table has the same sum. CPU s are "
    "seconds of the processor, of the whole training job on one core, the sampling of the table left out."
)


def text(rows: Sequence[Row]) -> str:
    """Return the text of ``methods.md``: tables for each world, methods in the order of their gain.

    On a tiny image model the tuned methods have their own table, since only they had equal trials.
    """
    lines = ["# Every method at equal compute", "", HOW, ""]
    for world, group in groupby(rows, key=lambda row: row["world"]):
        every = list(group)
        for kind in ABOUT:
            for tuned in (True, False):
                chosen = [row for row in every if (kind_of(row), "trials" in row) == (kind, tuned)]
                if chosen:
                    lines += _world(world, chosen, kind, tuned)
    return "\n".join(lines).rstrip() + "\n"


def kind_of(row: Row) -> str:
    """Return the group of a row's table: offline, online, or reward gradients."""
    if "rollout" not in row["asked"]:
        return "offline"
    return "reward gradients" if _trained(row) else "online"


def _trained(row: Row) -> str | None:
    """Return the measured reward other than the judge that a row's rollouts are trained on, if any."""
    specs = row["asked"]["rollout"]["RolloutConfig"]["rewards"]
    others = (name for name in row["rewards"] if name != row["primary"])
    return next((name for name in others if any(spec.endswith(name) for spec in specs)), None)


def _world(world: str, rows: list[Row], kind: str, tuned: bool) -> list[str]:
    by_method = [list(group) for _, group in groupby(rows, key=lambda row: row["method"])]
    by_method.sort(key=lambda group: (_left(group), -over_seeds([row["gains"] for row in group]).value))
    first = rows[0]
    others: tuple[str, ...] = ("off support", "distance") if world == "plane" else others_of(first)
    if kind == "reward gradients":
        others = ("trained", "taste")
    others += ("images",) if kind != "offline" else ()
    others += ("diversity", "drift") if tuned else ()
    held_out = "" if world == "plane" or kind == "reward gradients" else _HELD_OUT[world]
    about = "" if world == "plane" else ", tuned" if tuned else ", settings of the recipes"
    lines = [
        f"## {TITLES[world]}{'' if kind == 'offline' else f': {kind}'}{about}",
        "",
        *ABOUT[kind],
        *([TUNED, ""] if tuned else [] if world == "plane" else [UNTUNED, ""]),
        f"{NOTES[world]} {held_out}{first['asked']['prompts']} "
        f"{'points' if world == 'plane' else 'prompts'}, budget "
        f"{first['asked']['budget']:,.0f} forward-equivalents. {first['machine']}, torch "
        f"{first['versions']['torch']}, {min(r['date'] for r in rows)} to {max(r['date'] for r in rows)}.",
        "",
        f"| method | gain | seeds | {' | '.join(others)} | steps | held, trained, back a step | CPU s | |",
        "|---|---|---|" + "---|" * (len(others) + 4),
    ]
    lines += [_line(group, others) for group in by_method]
    if tuned:
        lines += ["", *_compared(by_method)]
    failed = [group[0]["method"] for group in by_method if over_seeds([r["gains"] for r in group]).low <= 0]
    if world != "plane" and failed:
        lines += ["", *_tried(world, failed)]
    return [*lines, ""]


def others_of(row: Row) -> tuple[str, ...]:
    """Return the measured rewards of a row that are not its primary."""
    return tuple(name for name in row["rewards"] if name != row["primary"])


def _compared(by_method: list[list[Row]]) -> list[str]:
    """Return the table of ranks and of differences to the first method, with its settings and trials."""
    gains = [[row["gains"] for row in group] for group in by_method]
    places = ranks(gains)
    against = [between(gains[0], table) for table in gains[1:]]
    adjusted = holm([p for _, p in against])
    lines = [
        "| method | rank, 95 % | behind the first | p (Holm) | settings | at the grid's edge "
        "| trials, gain on validation |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, group in enumerate(by_method):
        behind = ("", "") if i == 0 else (shown(against[i - 1][0]), f"{adjusted[i - 1]:.2g}")
        name, low, high = group[0]["method"], *places[i]
        every = trials_of(group[0]["world"], name)
        lines.append(
            f"| {name} | {low} to {high} | {behind[0]} | {behind[1]} | {flags_of(group[0]['flags'])} | "
            f"{', '.join(at_edge(every)) or 'no'} | "
            + "; ".join(f"{flags_of(t['flags'])}: {t['gain'][0]:+.3f}" for t in every)
            + " |"
        )
    return lines


def flags_of(flags: Sequence[str]) -> str:
    """Return changed settings as text."""
    return ", ".join(flag.removeprefix("--").split(".", 1)[1] for flag in flags) or "as shipped"


def _line(rows: list[Row], others: tuple[str, ...]) -> str:
    gain = over_seeds([row["gains"] for row in rows])
    row = rows[0]
    calls, starred = row["calls"], "*" if row["primary"] == "fidelity" else ""
    seconds = sum(r["seconds"] for r in rows) / len(rows)
    judged = "one seed" if len(rows) == 1 else verdict(gain, "better", "worse")
    cells = [
        row["method"] + starred,
        shown(gain),
        ", ".join(f"{r['rewards'][r['primary']]['gain'][0]:+.3f}" for r in rows),
        *(_other(rows, name) for name in others),
        str(row["steps"]),
        ", ".join(f"{calls[k]:.0f}" for k in ("held", "trained", "back")),
        f"{seconds:.0f}",
        "leaves the support" if _left(rows) else judged,
    ]
    return f"| {' | '.join(cells)} |"


def _left(rows: list[Row]) -> bool:
    """Return whether more than 3 % of a method's mass is off the support, on average over seeds."""
    return sum(row["figures"].get("off support", 0.0) for row in rows) / len(rows) > 0.03


def _other(rows: list[Row], name: str) -> str:
    """Return the mean over seeds of a figure, or of a reward's gain, as text; of *trained*, each seed's."""
    if name == "trained":
        gains = [r["rewards"][_trained(r)]["gain"] for r in rows]
        return ", ".join(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high in gains)
    if name in rows[0]["figures"]:
        mean = sum(r["figures"][name] for r in rows) / len(rows)
        return f"{mean:,.0f}" if name == "images" else f"{mean:.3f}"
    return f"{sum(r['rewards'][name]['gain'][0] for r in rows) / len(rows):+.3f}"


def _tried(world: str, methods: list[str]) -> list[str]:
    """Return lines on the trials of methods without a gain."""
    lines = []
    for method in methods:
        tried = "; ".join(
            f"{' '.join(t['flags']) or 'as shipped'}: {shown(t['gain'])}" for t in trials_of(world, method)
        )
        lines.append(
            f"- `{method}` has no interval of the judge above 0. Tried on validation prompts: "
            f"{tried or 'nothing yet'}."
        )
    return lines
