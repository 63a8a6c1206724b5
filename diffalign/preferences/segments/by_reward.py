"""Segment labels from rewards: each reward votes for the video whose segment it scores higher.

A video reward scores a segment's frames as a video; an image reward scores some of its frames and averages
(``rewards.videos``). Scores that differ by at most a margin are a tie. With several rewards the majority of
votes counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from diffalign.preferences.segments.pairs import Label, Pair, cut
from diffalign.rewards.videos import takes_videos
from diffalign.types import Reward
from diffalign.utils.chat_completions import Answers


@dataclass(frozen=True)
class ByReward:
    """A labeller on rewards.

    Attributes:
        rewards: the rewards, by name.
        margin: difference of scores that a vote must exceed.
        seconds: length of a segment, in seconds.
        answers: file that stores scores, so that another margin needs no new scoring; None: none are stored.
        identity: identity of each reward, by name, for the keys of stored scores; scores of rewards without
            one are not stored.
    """

    rewards: Mapping[str, Reward]
    margin: float = 0.0
    seconds: float = 1.0
    answers: Answers | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    _known: dict[str, list[list[float]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise UserError(f"--margin {self.margin}; allowed: 0 or more")
        rows = self.answers.rows if self.answers else ()
        stored = (row for row in rows if {"key", "scores"} <= row.keys())
        self._known.update((row["key"], row["scores"]) for row in stored)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return ", ".join(self.rewards)

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return one label a segment."""
        scores = [self._scores(name, pair, count) for name in self.rewards]
        return [self._vote([(first[s], second[s]) for first, second in scores]) for s in range(count)]

    def _vote(self, scores: Sequence[tuple[float, float]]) -> Label:
        lead = sum((a - b > self.margin) - (b - a > self.margin) for a, b in scores)
        return "first" if lead > 0 else "second" if lead < 0 else "tie"

    def _scores(self, name: str, pair: Pair, count: int) -> list[list[float]]:
        """Return one reward's scores (2, S) of both videos' segments."""
        parts = (self.identity.get(name, ""), pair.content, pair.prompt, f"{self.seconds} {count}")
        key = digest(*(part.encode() for part in parts))
        if key in self._known and name in self.identity:
            return self._known[key]
        segments = [part for video in (0, 1) for part in cut(pair, video, self.seconds, count)]
        flat = takes_videos(self.rewards[name])(segments, [pair.prompt] * len(segments)).tolist()
        scores = [flat[:count], flat[count:]]
        if self.answers is not None and name in self.identity:
            self.answers.add({"key": key, "reward": name, "pair": pair.where, "scores": scores})
        return scores
