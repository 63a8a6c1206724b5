"""Whether the scores of a set are of the range that a method reads them in."""

from collections.abc import Callable, Iterator
from typing import Any

from diffalign.config.schema import RolloutConfig
from diffalign.data import EncodedSet
from diffalign.errors import UserError
from diffalign.methods._common import OfScores
from diffalign.types import Method


def check_scores(method: Method[Any], encoded: EncodedSet, tell: Callable[[str], None]) -> None:
    """Check the scores of an encoded set; ``tell`` gets a line where a tolerated few lie outside.

    Raises:
        UserError: more lie outside of the method's range than it tolerates.
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


def check_online_scores(method: Method[Any], rollout: RolloutConfig) -> None:
    """Check whether an online run's scores are of the range of a method that allows only shares.

    Raises:
        UserError: they are sums of rewards.
    """
    shares = isinstance(method, OfScores) and not method.score_range.rewards
    if shares and rollout.by == "rewards" and rollout.combine not in ("wins", "rank"):
        raise UserError(
            f"rollout.combine={rollout.combine!r} with {type(method).__name__}, which reads scores of 0 to "
            "1; allowed: wins or rank (shares of won comparisons), or rollout.by people"
        )


def _scores(encoded: EncodedSet, rewards: bool) -> Iterator[tuple[float, str]]:
    """Yield (score, place in the set) of every image: its first reward where it has one and they are read."""
    for record in encoded:
        for index in range(len(record.images)):
            read = record.rewards[index] if rewards and record.rewards else record.scores[index : index + 1]
            yield from ((value, record.where) for value in read)
