"""Rewards of the images of a group, beside its label or instead of it."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import torch

from diffalign.data.encoding.columns import Columns
from diffalign.data.reading.examples import is_tie
from diffalign.errors import UserError
from diffalign.losses.comparisons import beaten

Rewards = tuple[tuple[float, ...], ...]
RewardsAs = Literal["extra", "score", "wins"]


@runtime_checkable
class Rater(Protocol):
    """Scores images by the rewards that a run names (``diffalign.rewards.scoring.rater``)."""

    @property
    def fingerprint(self) -> str:
        """A text that changes whenever the scores would: the rewards and their weights."""
        ...

    def __call__(self, images: Sequence[bytes], prompts: Sequence[str]) -> Sequence[tuple[float, ...]]:
        """Return a row of R scores for each of the image files, higher is better."""
        ...


def wins(rewards: Rewards) -> tuple[float, ...]:
    """Return each image's share of won comparisons, n rewards times k - 1 rivals; only strictly greater
    scores win.

    Syn-Pic's aggregation, phi_i = wins_i / (n (k - 1)) (Karthik et al. 2024, arXiv 2410.18013), which needs
    no common scale.
    """
    scores = torch.tensor(rewards, dtype=torch.float64)
    k, n = scores.shape
    return tuple((beaten(scores).sum(-1) / (n * (k - 1))).tolist())


def rescored(scores: tuple[float, ...], rewards: Rewards, how: RewardsAs, where: str) -> tuple[float, ...]:
    """Return the scores of a group by rewards in place of its label; UserError with the group's place if that
    is impossible.

    "score": the one reward, but a label's tie stays a tie; "wins": the share of won comparisons.
    """
    if how == "extra":
        return scores
    if not rewards:
        raise UserError(
            f"{where}: data.rewards_as is {how!r}, but there is no reward; "
            f"name some in data.rewards, or give the set a column rewards"
        )
    if len(rewards) < 2:
        raise UserError(
            f"{where}: data.rewards_as is {how!r}, but the image has no rival; allowed for it: extra"
        )
    if how == "wins":
        return wins(rewards)
    if len(rewards[0]) > 1:
        raise UserError(
            f"{where}: data.rewards_as is 'score', but there are {len(rewards[0])} rewards; "
            f"allowed: one reward, or data.rewards_as wins"
        )
    return scores if is_tie(scores) else tuple(reward for (reward,) in rewards)


def same_number(records: Columns) -> None:
    """Raise UserError naming the first record that has another number of rewards than the first one."""
    counts = records.reward_counts
    other = (counts != counts[:1]).nonzero()[0]
    if len(other):
        at = int(other[0])
        raise UserError(
            f"{records[at].where}: {counts[at]} rewards an image, but {counts[0]} in {records[0].where}; "
            f"allowed: the same number in every row"
        )
