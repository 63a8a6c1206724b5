"""Any rewards as a judge of segments: each votes for the video that it scores higher there.

A reward of videos sees a segment's frames as a video; one of images gives the mean over some of its frames
(``rewards.videos``). Scores that differ by at most a margin are a tie; with several rewards the majority
of votes counts.
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
    """Votes of rewards.

    Attributes:
        rewards: by name.
        margin: scores must differ by more than this.
        seconds: of a segment.
        answers: keeps scores, so that another margin costs nothing; None: none are kept.
        identity: what says, by its name, which reward a score is of; scores of others are not kept.
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
        kept = (row for row in (self.answers.rows if self.answers else ()) if {"key", "scores"} <= row.keys())
        self._known.update((row["key"], row["scores"]) for row in kept)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return ", ".join(self.rewards)

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return a label a segment."""
        scores = [self._scores(name, pair, count) for name in self.rewards]
        return [self._vote([(one[0][s], one[1][s]) for one in scores]) for s in range(count)]

    def _vote(self, scores: Sequence[tuple[float, float]]) -> Label:
        lead = sum((a - b > self.margin) - (b - a > self.margin) for a, b in scores)
        return "first" if lead > 0 else "second" if lead < 0 else "tie"

    def _scores(self, name: str, pair: Pair, count: int) -> list[list[float]]:
        """Return (2, S) scores of both videos' segments by one reward."""
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
