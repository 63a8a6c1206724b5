"""The page of over-optimisation: its arms, their curves over training, and what the curves say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks import arms
from benchmarks.record import Row, over_seeds, shown
from benchmarks.tiny_world import DRIFT_STEPS, ONLINE_BUDGET
from diffalign.evaluation.measuring.statistics import Estimate
from diffalign.runs.demo import REWARDS

FRACTIONS = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the budget
LABELS = ("1/8", "1/4", "1/2", "1", "2")
JUDGE = REWARDS[0]
MEASURED = (*REWARDS, "step_aware:tiny")
TITLES = dict(zip(MEASURED, ("judge", "taste", "tiny CLIP", "step-aware model"), strict=True))


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
    Arm("ipo", "IPO, the same pairs", "ipo", "judge"),
    Arm("dmpo", "DMPO, the same pairs", "dmpo", "judge"),
    Arm("simpo", "SimPO, the same pairs", "simpo", "judge"),
    Arm("smpo", "SmPO, the same pairs with the judge's scores", "smpo", "judge"),
    Arm("mapo", "MaPO, the same pairs", "mapo", "judge"),
    Arm("kto", "Diffusion-KTO, likes of the judge", "kto", "judge"),
    Arm("sft", "SFT on the winners", "sft", "judge"),
)


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
    return f"{where}, {'falls' if change.high < 0 else 'no fall shown'}: {shown(change)}"


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
            found.append(f"{TITLES[name]} {shown(change)} from {since} on, the trained reward {shown(rise)}")
    if not found:
        return f"{trained}; no held-out reward is shown to fall while it rises."
    alone = ", in one seed" if curves[arm.trained].shape[1] == 1 else ""
    return f"{trained}. **A sign of over-optimisation**{alone}: {'; '.join(found)}."


def missing(by_arm: Mapping[Arm, Sequence[Sequence[Row]]]) -> str:
    """Return a sentence on the arms whose training has not been measured to the end; "" if there is none."""
    found = []
    for point, label in enumerate(LABELS):
        there = [arm for arm, points in by_arm.items() if any(p[0]["point"] == point for p in points)]
        if absent := [arm.name for arm in ARMS if arm not in there]:
            found.append(f"at compute {label}: {'all arms' if not there else ', '.join(absent)}")
    return f"Not measured yet, {'; '.join(found)}." if found else ""


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
        "falls; each curve has an interval of its own, so that of all held-out ones some fall by chance."
    )


def text(start: Row, rows: Sequence[Row]) -> str:
    """Return the page of every row."""
    by_arm = {arm: points for arm in ARMS if (points := course_of(arm, rows))}
    curves = {arm: {name: curve(start, points, name) for name in MEASURED} for arm, points in by_arm.items()}
    how = _how(start, [len(points[0]) for points in by_arm.values()])
    lines = ["# Over-optimisation on the tiny SDXL", "", how, ""]
    if absent := missing(by_arm):
        lines += [absent, ""]
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
