"""Checks that scores are in the range that a method expects."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from diffalign.config.schema import DataConfig, RolloutConfig
from diffalign.data import EncodedSet
from diffalign.errors import UserError
from diffalign.methods._common import OfScores
from diffalign.rewards.registry import usual_range
from diffalign.rewards.specs import all_weighted
from diffalign.types import Method


def check_scores(method: Method[Any], encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Check the scores of an encoded set; ``tell`` gets a line if a tolerated share is out of range.

    Raises:
        UserError: more of them are out of range than the method tolerates.
    """
    if not isinstance(method, OfScores):
        return
    allowed, name = method.score_range, type(method).__name__
    found = list(_scores(encoded, allowed.rewards))
    outside = [(value, where) for value, where in found if not allowed.low <= value <= allowed.high]
    if not outside:
        return
    values = [value for value, _ in found]
    line = (
        f"{len(outside)} of {len(found)} scores are outside of {allowed.low:.4g} to {allowed.high:.4g}, the "
        f"range that {name} reads (they are {min(values):.4g} to {max(values):.4g}; first {outside[0][1]})"
    )
    if len(outside) > allowed.tolerated * len(found):
        raise UserError(f"{line}; allowed: {allowed.advice}")
    tell(f"warning: {line}")


def check_reward_range(method: Method[Any], data: DataConfig) -> None:
    """Check the range of a reward by its card, before any image is scored.

    Raises:
        UserError: all usual scores of the reward are out of the method's range.
    """
    if isinstance(method, OfScores) and method.score_range.rewards and len(data.rewards) == 1:
        _check_usual(method, data.rewards[0], usual_range(data.rewards[0]))


def check_online_scores(method: Method[Any], rollout: RolloutConfig) -> None:
    """Check the range of an online run's scores, as far as the cards of its rewards state it.

    Raises:
        UserError: they are sums of rewards where only shares are allowed, or outside of the range.
    """
    if not isinstance(method, OfScores):
        return
    allowed, sums = method.score_range, rollout.by == "rewards" and rollout.combine not in ("wins", "rank")
    if not allowed.rewards and sums:
        raise UserError(
            f"rollout.combine={rollout.combine!r} with {type(method).__name__}, which reads scores of 0 to "
            "1; allowed: wins or rank (shares of won comparisons), or rollout.by people"
        )
    if not sums and not allowed.low <= 0 < 1 <= allowed.high:
        raise UserError(
            f"rollout.by={rollout.by!r} and combine={rollout.combine!r} give scores of 0 to 1, and "
            f"{type(method).__name__} reads {allowed.low:.4g} to {allowed.high:.4g}; allowed: "
            f"{allowed.advice}"
        )
    if sums and rollout.normalise == "none":
        _check_usual(method, " + ".join(rollout.rewards), usual_sum(rollout.rewards))


def usual_sum(rewards: Sequence[str]) -> tuple[float, float] | None:
    """Return the usual smallest and largest weighted sum of rewards; None where a card does not state it."""
    low = high = 0.0
    for reward in all_weighted(rewards):
        ends = usual_range(reward.spec)
        if ends is None:
            return None
        scaled = sorted(reward.weight * end for end in ends)
        low, high = low + scaled[0], high + scaled[1]
    return low, high


def _check_usual(method: OfScores, what: str, usual: tuple[float, float] | None) -> None:
    allowed = method.score_range
    if usual and (usual[1] < allowed.low or usual[0] > allowed.high):
        raise UserError(
            f"scores of {what} are usually {usual[0]:.4g} to {usual[1]:.4g}, outside of {allowed.low:.4g} to "
            f"{allowed.high:.4g}, the range that {type(method).__name__} reads; allowed: {allowed.advice}"
        )


class RoundScores:
    """Checks the scores of each round of an online run against the range of its method.

    If more scores are out of range than the method tolerates, the first round ends the run; later rounds,
    where training may have caused it, give one warning.
    """

    def __init__(self, method: Method[Any], tell: Callable[[str], None]) -> None:
        self._allowed = method.score_range if isinstance(method, OfScores) else None
        self._name, self._tell = type(method).__name__, tell
        self._first = self._quiet = True

    def __call__(self, scores: Tensor) -> None:
        """Check scores of any shape.

        Raises:
            UserError: see the class.
        """
        first, self._first = self._first, False
        if self._allowed is None:
            return
        low, high = self._allowed.low, self._allowed.high
        outside = int(((scores < low) | (scores > high)).sum())
        if not outside:
            return
        line = (
            f"{outside} of {scores.numel()} scores of a round are outside of {low:.4g} to {high:.4g}, the "
            f"range that {self._name} reads (they are {float(scores.min()):.4g} to {float(scores.max()):.4g})"
        )
        if first and outside > self._allowed.tolerated * scores.numel():
            raise UserError(f"{line}; allowed: {self._allowed.advice}")
        if self._quiet:
            self._tell(f"warning: {line}")
            self._quiet = False


def _scores(encoded: EncodedSet, rewards: bool) -> Iterator[tuple[float, str]]:
    """Yield (score, place in the set) of every image: its first reward where it has one and they are read."""
    for record in encoded:
        for index in range(len(record.images)):
            read = record.rewards[index] if rewards and record.rewards else record.scores[index : index + 1]
            yield from ((value, record.where) for value in read)
