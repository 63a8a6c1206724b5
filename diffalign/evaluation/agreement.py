"""Accuracy of rewards on human preferences, and agreement between rewards.

The units are comparisons: every two rivals of a labelled group. Accuracy is the share of those with a winner
that the reward scores higher, equal scores counting half, with Wilson's 95 % interval. Ties of the labels are
excluded and counted separately. Comparisons of one prompt are treated as independent, so the interval is too
narrow for sets with many comparisons of a prompt.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, islice

import numpy as np

from diffalign.data.reading.examples import Counts, Example, Preferences
from diffalign.errors import UserError
from diffalign.evaluation.measuring.statistics import Estimate, wilson
from diffalign.rewards.scoring.cache import ScoreCache
from diffalign.rewards.scoring.items import Item
from diffalign.rewards.scoring.score import Scored, Scorer, Unreadable, each_scored


@dataclass(frozen=True)
class Group:
    """A labelled group: K labels, and K rows of R scores; higher is better in both."""

    where: str
    labels: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Bin:
    """Comparisons whose scores differ by ``low`` to ``high``, and the accuracy among them."""

    low: float
    high: float
    pairs: int
    accuracy: Estimate


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a reward on the labels.

    Attributes:
        reward: its name.
        pairs: comparisons with a winner.
        right, wrong, equal: numbers of these whose winner scores higher, lower, the same.
        accuracy: (right + equal / 2) / pairs.
        by_margin: the same by quantiles of the scores' difference, the smallest first.
        median_margin: of the scores' difference, and ``median_margin_of_ties`` where labels are equal (None
            if none are); a guide for the width of a tie band.
    """

    reward: str
    pairs: int
    right: int
    wrong: int
    equal: int
    accuracy: Estimate
    by_margin: tuple[Bin, ...]
    median_margin: float
    median_margin_of_ties: float | None


@dataclass(frozen=True)
class Agreement:
    """The agreement of two rewards on all comparisons, labelled or not.

    Attributes:
        first, second: their names.
        pairs: comparisons where neither scores a tie; ``undecided`` the others.
        same: share on which both prefer the same image.
        tau: 2 x same - 1, which is Kendall's tau within groups, and Cohen's kappa, since half would agree by
            chance (the order of a pair is arbitrary).
    """

    first: str
    second: str
    pairs: int
    undecided: int
    same: Estimate | None
    tau: float | None


@dataclass(frozen=True)
class Report:
    """Accuracies and agreements on a labelled set, of which ``ties`` comparisons have no winner."""

    pairs: int
    ties: int
    accuracies: tuple[Accuracy, ...]
    agreements: tuple[Agreement, ...]


@dataclass(frozen=True)
class Rated:
    """The scored groups, the set's counts, the number of single images (without rival), and the places of
    unreadable images, whose groups are left out.
    """

    groups: tuple[Group, ...] = field(repr=False)
    counts: Counts
    singles: int
    unreadable: tuple[str, ...]


def rate(
    preferences: Preferences,
    scorers: Sequence[Scorer],
    cache: ScoreCache | None = None,
    *,
    of_videos: bool = False,
    progress: bool = True,
) -> Rated:
    """Score every image of a labelled set.

    Raises:
        UserError: no group of two or more, none that is readable, or an error of a reward.
    """
    waiting: deque[Example] = deque()
    singles = [0]

    def items() -> Iterator[Item]:
        for example in preferences:
            if len(example.images) < 2:
                singles[0] += 1
                continue
            waiting.append(example)
            prompts = example.prompts or (example.prompt,) * len(example.images)
            for k, (image, prompt) in enumerate(zip(example.images, prompts, strict=True)):
                yield Item(prompt, image.file, (("file", example.where),), f"_{k}", of_videos)

    every = items()
    first = list(islice(every, 1))
    if not first:
        raise UserError(f"{preferences.name}: nothing to compare: {preferences.counts.text}")
    groups: list[Group] = []
    unreadable: list[str] = []
    results: list[Scored | Unreadable] = []
    for one in each_scored(chain(first, every), scorers, cache, progress):
        results.append(one)
        if isinstance(one, Unreadable):
            unreadable.append(one.text)
        if len(results) == len(waiting[0].images):
            example, scores = waiting.popleft(), [r.scores for r in results if isinstance(r, Scored)]
            if len(scores) == len(results):
                groups.append(Group(example.where, example.scores, tuple(scores)))
            results.clear()
    if not groups:
        raise UserError(f"{preferences.name}: no group can be read; the first: {unreadable[0]}")
    return Rated(tuple(groups), preferences.counts, singles[0], tuple(unreadable))


def report(groups: Sequence[Group], rewards: Sequence[str], bins: int = 4) -> Report:
    """Return accuracies and agreements of R rewards on labelled groups.

    Args:
        groups: with R scores an image.
        rewards: R names.
        bins: quantiles of the margin; equal margins share a bin, so there may be fewer.

    Raises:
        ValueError: fewer than one bin, or no group.
        UserError: no comparison has a winner.
    """
    if bins < 1 or not groups:
        raise ValueError(f"{bins} bins of {len(groups)} groups: at least one of each is needed")
    pairs = [(g, i, j) for g in groups for i, j in combinations(range(len(g.labels)), 2)]
    label = np.sign([g.labels[i] - g.labels[j] for g, i, j in pairs])
    margins = np.array([np.subtract(g.scores[i], g.scores[j]) for g, i, j in pairs])
    won = label != 0
    if not won.any():
        raise UserError(f"all {len(pairs)} labelled pairs are ties; accuracy needs some with a winner")
    accuracies = tuple(
        _accuracy(name, label[won] * margins[won, r], np.abs(margins[~won, r]), bins)
        for r, name in enumerate(rewards)
    )
    agreements = tuple(
        _agreement(rewards[a], rewards[b], margins[:, a], margins[:, b])
        for a, b in combinations(range(len(rewards)), 2)
    )
    return Report(len(pairs), int((~won).sum()), accuracies, agreements)


def _accuracy(name: str, leads: np.ndarray, of_ties: np.ndarray, bins: int) -> Accuracy:
    """Return the accuracy; ``leads`` (pairs,) is the winner's score minus the loser's."""
    size = np.abs(leads)
    edges = np.quantile(size, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, size)
    return Accuracy(
        name,
        len(leads),
        int((leads > 0).sum()),
        int((leads < 0).sum()),
        int((leads == 0).sum()),
        _share(leads),
        tuple(
            Bin(float(size[at].min()), float(size[at].max()), int(at.sum()), _share(leads[at]))
            for at in (place == number for number in range(bins))
            if at.any()
        ),
        float(np.median(size)),
        float(np.median(of_ties)) if len(of_ties) else None,
    )


def _share(leads: np.ndarray) -> Estimate:
    return wilson(float((leads > 0).sum() + (leads == 0).sum() / 2), len(leads))


def _agreement(first: str, second: str, a: np.ndarray, b: np.ndarray) -> Agreement:
    both = (a != 0) & (b != 0)
    pairs = int(both.sum())
    if not pairs:
        return Agreement(first, second, 0, len(a), None, None)
    same = wilson(int((np.sign(a[both]) == np.sign(b[both])).sum()), pairs)
    return Agreement(first, second, pairs, len(a) - pairs, same, 2 * same.value - 1)
