"""Comparison of aligned models with one base, on the same prompts and noise: the best one, its confidence,
and gains by category of prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from diffalign.evaluation.evaluate import Evaluation
from diffalign.evaluation.measuring.statistics import (
    LEVEL,
    Comparison,
    Estimate,
    compare,
    holm,
    outcomes,
    prompt_means,
    two_level_bootstrap,
)
from diffalign.media.files import MediaLike

BASE = "base"  # the base's name in tables, and of its images' folder
_RESAMPLES = 2_000  # of a category, of which there are many


@dataclass(frozen=True)
class CategoryResult:
    """One category of an axis (``category``: ``Animals``): comparisons by reward, on its prompts alone."""

    axis: str
    category: str
    comparisons: Mapping[str, Comparison]


@dataclass(frozen=True)
class RunsResult:
    """One reward over training runs: gain and win rate over runs and prompts, and each run's mean gain."""

    gain: Estimate
    win_rate: Estimate
    gains: tuple[float, ...]


@dataclass(frozen=True)
class Contest:
    """Evaluations of models on the same N prompts and noises as one base.

    Attributes:
        base: the base's images or videos, N.
        aligned: every model's, by name.
        evaluations: by name, in the order in which the models were given.
        categories: by axis, of each sample; "" where its prompt has none.
        adjusted: p-values by model and reward, with Holm's correction: those of the primary reward, which was
            chosen beforehand, over the models; those of the others over the others and the models.
        by_category: by model; empty where the prompts have no categories.
        repeats: whether the models are training runs of one recipe with several seeds.
    """

    base: tuple[MediaLike, ...] = field(repr=False)
    aligned: Mapping[str, tuple[MediaLike, ...]] = field(repr=False)
    evaluations: Mapping[str, Evaluation]
    categories: Mapping[str, tuple[str, ...]] = field(repr=False)
    adjusted: Mapping[str, Mapping[str, float]]
    by_category: Mapping[str, tuple[CategoryResult, ...]] = field(repr=False)
    repeats: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of the aligned models."""
        return tuple(self.evaluations)

    @property
    def order(self) -> tuple[str, ...]:
        """The names, the largest gain of the primary reward first."""
        gains = {name: e.primary.comparison.gain.value for name, e in self.evaluations.items()}
        return tuple(sorted(gains, key=lambda name: -gains[name]))

    @property
    def best(self) -> str:
        """The model of the largest gain of the primary reward, significant or not."""
        return self.order[0]

    @property
    def leading(self) -> Evaluation:
        """The evaluation of the best."""
        return self.evaluations[self.best]

    @property
    def verdict(self) -> str:
        """``better``, ``worse``, ``no difference shown`` or ``too few prompts``: of the best model.

        The best of several models is better by chance more often than a single one, so its test, corrected
        for their number, must be significant as well as its interval.
        """
        found = self.leading.verdict
        if found != "better" or len(self.names) == 1:
            return found
        corrected = self.adjusted[self.best][self.leading.primary.name]
        return "better" if corrected < LEVEL else "no difference shown"

    @cached_property
    def over_runs(self) -> Mapping[str, RunsResult]:
        """By reward, gains and win rates over training runs and prompts; empty unless ``repeats``."""
        if not self.repeats:
            return {}
        found = {}
        for place, result in enumerate(self.leading.rewards):
            gains, wins = [], []
            for evaluation in self.evaluations.values():
                own = evaluation.rewards[place]
                before, after = np.array(own.base_scores), np.array(own.aligned_scores)
                gains.append(prompt_means(after - before, evaluation.prompts)[1])
                wins.append(prompt_means(outcomes(before, after), evaluation.prompts)[1])
            found[result.name] = RunsResult(
                two_level_bootstrap(np.stack(gains), self.leading.seed),
                two_level_bootstrap(np.stack(wins), self.leading.seed),
                tuple(float(gain.mean()) for gain in gains),
            )
        return found

    @property
    def leads(self) -> bool:
        """Whether the best of several is significantly ahead of the next: see ``Comparison.outcome``."""
        return self.lead is not None and self.lead.outcome == "better"

    @property
    def lead(self) -> Comparison | None:
        """The comparison of the best with the next best by the primary reward; None for one model."""
        if len(self.names) == 1:
            return None
        best, second = (self.evaluations[name].primary.aligned_scores for name in self.order[:2])
        return compare(second, best, self.leading.prompts, self.leading.seed)


def contest(
    base: Sequence[MediaLike],
    aligned: Mapping[str, Sequence[MediaLike]],
    evaluations: Mapping[str, Evaluation],
    categories: Mapping[str, Sequence[str]] | None = None,
) -> Contest:
    """Return the contest of evaluations of the same base, prompts and rewards.

    Args:
        base: N images or videos.
        aligned: N by model.
        evaluations: by model; the first reward is the primary one.
        categories: N by axis.
    """
    adjusted: dict[str, dict[str, float]] = {name: {} for name in evaluations}
    for family in (slice(0, 1), slice(1, None)):  # the primary reward, and the others
        tests = [(name, result) for name, e in evaluations.items() for result in e.rewards[family]]
        corrected = holm([result.comparison.p_value for _, result in tests])
        for (name, result), p_value in zip(tests, corrected, strict=True):
            adjusted[name][result.name] = p_value
    axes = {axis: tuple(values) for axis, values in (categories or {}).items()}
    return Contest(
        tuple(base),
        {name: tuple(aligned[name]) for name in evaluations},
        dict(evaluations),
        axes,
        adjusted,
        {name: _by_category(evaluation, axes) for name, evaluation in evaluations.items()},
    )


def alone(
    evaluation: Evaluation, base: Sequence[MediaLike] = (), aligned: Sequence[MediaLike] = ()
) -> Contest:
    """Return the contest of one aligned model, called ``aligned``."""
    return contest(base, {"aligned": aligned}, {"aligned": evaluation})


def _by_category(
    evaluation: Evaluation, categories: Mapping[str, tuple[str, ...]]
) -> tuple[CategoryResult, ...]:
    """Every category of every axis, in order of appearance."""
    found = []
    for axis, values in categories.items():
        for category in dict.fromkeys(value for value in values if value):
            chosen = [i for i, value in enumerate(values) if value == category]
            prompts = [evaluation.prompts[i] for i in chosen]
            comparisons = {
                result.name: compare(
                    [result.base_scores[i] for i in chosen],
                    [result.aligned_scores[i] for i in chosen],
                    prompts,
                    evaluation.seed,
                    _RESAMPLES,
                )
                for result in evaluation.rewards
            }
            found.append(CategoryResult(axis, category, comparisons))
    return tuple(found)
