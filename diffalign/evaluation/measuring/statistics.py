"""Paired statistics of base and aligned scores on the same prompts and seeds.

Prompts are the units. Images of one prompt are not independent of each other, so their values are averaged
first and whole prompts are resampled: the percentile bootstrap (Efron & Tibshirani 1993, chapter 13). The
p-value is that of the sign-flip permutation test (Fisher 1935); wins against losses have the exact sign test,
proportions Wilson's interval (Wilson 1927), and several tests at once Holm's correction (Holm 1979).
Everything is deterministic by its seed, and numpy only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffalign.utils.intervals import Z95 as Z95
from diffalign.utils.intervals import Estimate as Estimate
from diffalign.utils.intervals import wilson as wilson

LEVEL = 0.05  # of the tests: below it a difference counts as shown
MIN_PROMPTS = 6  # with fewer the sign-flip p is above 0.05 even if all prompts improve
_BLOCK = 4_000_000  # numbers drawn at once: bounds the memory, not the result's shape


@dataclass(frozen=True)
class Comparison:
    """The comparison of aligned and base scores by one reward.

    Attributes:
        base, aligned: means over prompts of the prompts' mean scores.
        gain: aligned minus base.
        win_rate: share of images that score higher than their rival of the same prompt and seed, ties
            counting half; its interval is Wilson's where all prompts are won, or lost.
        wins, ties, losses: counts of images.
        p_value: two-sided, of the hypothesis that aligning changed nothing (sign-flip test over prompts).
        prompts: number of distinct prompts.
        untied: number of prompts with a gain other than 0.
    """

    base: float
    aligned: float
    gain: Estimate
    win_rate: Estimate
    wins: int
    ties: int
    losses: int
    p_value: float
    prompts: int
    untied: int

    @property
    def outcome(self) -> str:
        """``better``, ``worse``, ``no difference shown`` or ``too few prompts``, by the gain.

        A difference is shown where the gain's interval excludes 0 and the sign-flip test's p-value is below
        ``LEVEL``: of few untied prompts the interval is too narrow (4 gains and 8 ties have p = 0.125).
        """
        if self.prompts < MIN_PROMPTS:
            return "too few prompts"
        if self.p_value >= LEVEL or self.gain.low <= 0 <= self.gain.high:
            return "no difference shown"
        return "better" if self.gain.low > 0 else "worse"


def prompt_means(
    values: Sequence[float] | np.ndarray, prompts: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Return the P distinct prompts in order of appearance, and the mean of ``values`` (N,) within each,
    (P,).
    """
    if len(values) != len(prompts):
        raise ValueError(
            f"{len(values)} values but {len(prompts)} prompts: there must be one prompt per value"
        )
    names = list(dict.fromkeys(prompts))
    place = {name: i for i, name in enumerate(names)}
    index = np.array([place[p] for p in prompts], dtype=np.int64)
    count = np.bincount(index, minlength=len(names))
    return names, np.bincount(index, np.asarray(values, dtype=np.float64), len(names)) / count


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """Mean of ``values`` (P,) with the percentile bootstrap's 95 % interval. ValueError if there are none."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size:
        raise ValueError(f"a bootstrap needs one row of values, got shape {data.shape}")
    random = np.random.default_rng(seed)
    means = []
    rows = max(1, _BLOCK // data.size)
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), data.size)
        means.append(data[random.integers(0, data.size, size)].mean(1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high))


def two_level_bootstrap(
    values: Sequence[Sequence[float]] | np.ndarray, seed: int = 0, resamples: int = 10_000
) -> Estimate:
    """Return the mean of ``values`` (S, P), of S training runs on the same P prompts, with a 95 % interval.

    Runs and prompts are both resampled with replacement, each resample being the mean over its runs and
    prompts (the crossed bootstrap of Owen 2007, "The pigeonhole bootstrap"): the interval is of another
    training run on other prompts. Of fewer than five runs it is too narrow.

    Raises:
        ValueError: no table of values.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 2 or not data.size:
        raise ValueError(f"a two-level bootstrap needs runs by prompts, got shape {data.shape}")
    random, (runs, prompts) = np.random.default_rng(seed), data.shape
    means = np.empty(resamples)
    for i in range(resamples):
        # Weights of runs and prompts: how often each is drawn.
        a = np.bincount(random.integers(0, runs, runs), minlength=runs)
        b = np.bincount(random.integers(0, prompts, prompts), minlength=prompts)
        means[i] = a @ data @ b / (runs * prompts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(data.mean()), float(low), float(high))


def outcomes(base: Sequence[float] | np.ndarray, aligned: Sequence[float] | np.ndarray) -> np.ndarray:
    """(N,) of 1 where aligned is higher, 0 where base is, 0.5 where they are equal."""
    difference = np.asarray(aligned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    return (np.sign(difference) + 1) / 2


def compare(
    base: Sequence[float] | np.ndarray,
    aligned: Sequence[float] | np.ndarray,
    prompts: Sequence[str],
    seed: int = 0,
    resamples: int = 10_000,
) -> Comparison:
    """Compare N scores of base and aligned images; entry i of both has the same prompt and the same noise.

    Raises:
        ValueError: lengths that differ, no scores, or a score that is not a finite number.
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(aligned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1:
        raise ValueError(f"base and aligned must be paired, got {before.shape} and {after.shape} scores")
    if not before.size:
        raise ValueError("nothing to compare: no scores")
    for name, scores in (("base", before), ("aligned", after)):
        if not np.isfinite(scores).all():
            raise ValueError(f"score {int(np.argmin(np.isfinite(scores)))} of {name} is not a finite number")
    wins = outcomes(before, after)
    _, base_means = prompt_means(before, prompts)
    _, gains = prompt_means(after - before, prompts)
    _, win_means = prompt_means(wins, prompts)
    return Comparison(
        base=float(base_means.mean()),
        aligned=float((base_means + gains).mean()),
        gain=bootstrap_mean(gains, seed, resamples),
        win_rate=_rate(win_means, seed, resamples),
        wins=int((wins == 1).sum()),
        ties=int((wins == 0.5).sum()),
        losses=int((wins == 0).sum()),
        p_value=permutation_test(gains, seed, resamples),
        prompts=len(gains),
        untied=int((gains != 0).sum()),
    )


def _rate(wins: np.ndarray, seed: int, resamples: int) -> Estimate:
    """Return the mean of prompts' win rates (P,) with a 95 % interval: the bootstrap's, or Wilson's.

    Wilson's where all prompts were won or all lost, since resamples of equal values say nothing of others.
    """
    if (wins == wins[0]).all() and wins[0] in (0, 1):
        return wilson(float(wins.sum()), len(wins))
    return bootstrap_mean(wins, seed, resamples)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of ``wins`` against ``losses`` under a fair coin; ties are not counted."""
    trials, most = wins + losses, max(wins, losses)
    tail = sum(math.comb(trials, k) for k in range(most, trials + 1))
    return min(1.0, float(2 * tail / 2**trials)) if trials else 1.0


def permutation_test(
    differences: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 10_000
) -> float:
    """Two-sided p-value that the mean of paired ``differences`` (P,) is 0, by flipping their signs.

    Exact (all 2^P flips) where there are at most ``resamples`` of them, else that many random ones, including
    the observed one, so that it is never 0.
    """
    data = np.asarray(differences, dtype=np.float64)
    observed = abs(data.sum())
    slack = 1e-12 * max(1.0, float(abs(data).sum()))  # sums in another order differ by rounding
    if 2 ** min(data.size, 60) <= resamples:
        codes = np.arange(2**data.size)[:, None] >> np.arange(data.size)
        return float((abs((1 - 2 * (codes & 1)) @ data) >= observed - slack).mean())
    random = np.random.default_rng(seed)
    rows, extreme = max(1, _BLOCK // data.size), 0
    for start in range(0, resamples, rows):
        size = (min(rows, resamples - start), data.size)
        signs = 1 - 2 * random.integers(0, 2, size, dtype=np.int8)
        extreme += int((abs(signs @ data) >= observed - slack).sum())
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return adjusted p-values of several tests, in their order: where nothing is different, the chance that
    any of them is below a level is at most that level. The smallest of m is taken m times, the next m - 1
    times, and so on; none falls below a smaller one's.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
