"""Detection of over-optimisation: the trained reward rises while other rewards or the images get worse.

Every evaluation samples the same prompts from the same noise, so each image is paired with one of the first
evaluation, of the base. There is an alarm when a reward that is trained on has risen since then (the paired
95 % interval over prompts is above 0) and a reward that is not trained on has fallen (its interval is below
0), or a statistic of the images has left the range of ``image_statistics.CONCERNS``. With fewer than
``evaluate.MIN_PROMPTS`` prompts there is no alarm.

That optimising a proxy finally lowers the true objective: Gao et al. 2022 (arXiv 2210.10760). For the
statistics of images that show it early see ``image_statistics``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffalign.evaluation.evaluate import MIN_PROMPTS
from diffalign.evaluation.measuring.image_statistics import StatisticChange, diversities, statistic_changes
from diffalign.evaluation.measuring.measuring import Measured, check_finite
from diffalign.evaluation.measuring.statistics import Estimate, compare


@dataclass(frozen=True)
class Scores:
    """The measurements of N images in one evaluation.

    Attributes:
        prompts: N, in the order in which they were drawn.
        rewards: scores by reward, N each.
        statistics: image statistics by name, N each.
        diversity: by prompt, of those with several images.
    """

    prompts: tuple[str, ...] = field(repr=False)
    rewards: Mapping[str, tuple[float, ...]] = field(repr=False)
    statistics: Mapping[str, tuple[float, ...]] = field(repr=False)
    diversity: Mapping[str, float] = field(repr=False)


@dataclass(frozen=True)
class RewardChange:
    """One reward: whether it is trained on, its mean over prompts in the first evaluation and now, the paired
    gain, and whether lower is better (a weight below 0).
    """

    name: str
    trained: bool
    base: float
    now: float
    gain: Estimate
    lower: bool = False

    @property
    def better(self) -> bool:
        """Whether it has improved beyond its interval."""
        return self.gain.high < 0 if self.lower else self.gain.low > 0

    @property
    def worse(self) -> bool:
        """Whether it has become worse beyond its interval."""
        return self.gain.low > 0 if self.lower else self.gain.high < 0


@dataclass(frozen=True)
class Alarm:
    """A reward or statistic that became worse, and a sentence with advice."""

    about: str
    text: str


@dataclass(frozen=True)
class Entry:
    """The comparison of one evaluation with the first."""

    step: int
    rewards: tuple[RewardChange, ...]
    statistics: tuple[StatisticChange, ...]
    alarms: tuple[Alarm, ...] = ()

    @property
    def scalars(self) -> dict[str, float]:
        """Means by reward and by statistic, and the number of alarms, named as they are logged."""
        values = {reward.name: reward.now for reward in self.rewards}
        values |= {change.name: change.aligned for change in self.statistics}
        return {f"validation/{name}": value for name, value in values.items()} | {
            "validation/alarm": float(len(self.alarms))
        }


@dataclass(frozen=True)
class History:
    """The evaluations of a run.

    Attributes:
        base: of the first one.
        trained: the rewards that are trained on.
        lower: the rewards, trained on or not, of which less is better.
        entries: one an evaluation, by step; the first compares the base with itself.
        seed: of the bootstrap.
    """

    base: Scores
    trained: tuple[str, ...]
    lower: tuple[str, ...]
    entries: tuple[Entry, ...]
    seed: int = 0

    def after(self, step: int, scores: Scores) -> "History":
        """Return the history with one more evaluation.

        Raises:
            ValueError: its prompts or rewards are not those of the first.
        """
        if scores.prompts != self.base.prompts or scores.rewards.keys() != self.base.rewards.keys():
            raise ValueError("an evaluation is compared with one of the same prompts and rewards")
        entry = compared(step, self.base, scores, self.trained, self.lower, self.seed)
        quiet = max((e.step for e in self.entries[1:] if not e.alarms), default=None)
        alarms = alarms_of(entry, len(set(self.base.prompts)), quiet)
        return replace(self, entries=(*self.entries, replace(entry, alarms=alarms)))

    def until(self, step: int) -> "History":
        """Return the history without the evaluations after ``step``."""
        return replace(self, entries=tuple(e for e in self.entries if e.step <= step))

    @property
    def new_alarms(self) -> tuple[Alarm, ...]:
        """The alarms of the last evaluation that no earlier evaluation had."""
        known = {alarm.about for entry in self.entries[:-1] for alarm in entry.alarms}
        return tuple(alarm for alarm in self.entries[-1].alarms if alarm.about not in known)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads: the base's single scores, and the figures of every evaluation."""
        return asdict(self)


def begin(
    step: int, scores: Scores, trained: Sequence[str], lower: Sequence[str] = (), seed: int = 0
) -> History:
    """Return a history whose base is ``scores``, measured at ``step`` (0: the model as it was)."""
    entry = compared(step, scores, scores, trained, lower, seed)
    return History(scores, tuple(trained), tuple(lower), (entry,), seed)


def scores_of(measured: Measured, prompts: Sequence[str], rewards: Sequence[str]) -> Scores:
    """Return the scores of an evaluation from the measurements of N images.

    Raises:
        UserError: a score that is not a finite number, with the reward and the prompt.
    """
    for name in rewards:
        check_finite(name, measured.scores[name], prompts, "the image")
    return Scores(
        tuple(prompts),
        {name: tuple(measured.scores[name]) for name in rewards},
        {name: tuple(values) for name, values in measured.statistics.items()},
        diversities(measured.thumbnails, prompts),
    )


def compared(
    step: int, base: Scores, now: Scores, trained: Sequence[str], lower: Sequence[str] = (), seed: int = 0
) -> Entry:
    """Return evaluation ``now`` against ``base``, image by image; alarms are `alarms_of` it."""
    rewards = []
    for name, scores in now.rewards.items():
        result = compare(base.rewards[name], scores, now.prompts, seed)
        means = result.base, result.aligned
        rewards.append(RewardChange(name, name in trained, *means, result.gain, name in lower))
    changes = statistic_changes(
        base.statistics, now.statistics, now.prompts, base.diversity, now.diversity, seed
    )
    return Entry(step, tuple(rewards), changes)


def alarms_of(entry: Entry, prompts: int, quiet: int | None = None) -> tuple[Alarm, ...]:
    """Return alarms on what became worse while a trained reward improved; none if none improved, or if there
    are too few prompts.

    Args:
        entry: the evaluation.
        prompts: number of distinct prompts.
        quiet: step of the last evaluation without an alarm, the first not counted; None if there is none.
    """
    risen = [r for r in entry.rewards if r.trained and r.better]
    if prompts < MIN_PROMPTS or not risen:
        return ()
    up = " and ".join(_moved(r.name, r.base, r.now, r.gain) for r in risen)
    worse = {
        r.name: _moved(r.name, r.base, r.now, r.gain) for r in entry.rewards if not r.trained and r.worse
    } | {s.name: _moved(f"the {s.title}", s.base, s.aligned, s.change) for s in entry.statistics if s.flagged}
    return tuple(
        Alarm(about, f"step {entry.step}: {up}, but {moved}: {_advice(entry.step, quiet)}")
        for about, moved in worse.items()
    )


def _moved(name: str, base: float, now: float, change: Estimate) -> str:
    verb = "rose" if change.value > 0 else "fell"
    return (
        f"{name} {verb} from {base:.4g} to {now:.4g} ({change.value:+.3g}, 95 % interval {change.low:+.3g} "
        f"to {change.high:+.3g})"
    )


def _advice(step: int, quiet: int | None) -> str:
    stop = f"stop at step {quiet}, the last evaluation without an alarm"
    if quiet is None:
        stop = f"stop before step {step}"
    return (
        "the reward is being over-optimised. Look at the images; lower optimizer.learning_rate, raise the "
        f"method's hold on the reference (kl, or beta), or {stop}"
    )


def from_json(data: Mapping[str, Any]) -> History:
    """Return the history of ``History.to_json``'s tree. KeyError or TypeError for anything else."""
    base = data["base"]
    return History(
        Scores(
            tuple(base["prompts"]),
            {name: tuple(values) for name, values in base["rewards"].items()},
            {name: tuple(values) for name, values in base["statistics"].items()},
            dict(base["diversity"]),
        ),
        tuple(data["trained"]),
        tuple(data["lower"]),
        tuple(
            Entry(
                entry["step"],
                tuple(RewardChange(**{**r, "gain": Estimate(**r["gain"])}) for r in entry["rewards"]),
                tuple(
                    StatisticChange(**{**s, "change": Estimate(**s["change"])}) for s in entry["statistics"]
                ),
                tuple(Alarm(**alarm) for alarm in entry["alarms"]),
            )
            for entry in data["entries"]
        ),
        data["seed"],
    )
