"""Dense labels: a score for every segment of a video, and the resulting score of each latent frame.

Segment s of a label is about the seconds s L up to (s + 1) L of the clip, L = ``segment_seconds``, and so
about the frames that are shown in them. A latent frame's score is the mean of the scores of the frames that
it is made of (``codec.frames_of``: of a causal autoencoder of stride 4 the first is frame 0, the next frames
1 to 4). Segments beyond the clip's end are left out; a last part of less than half a segment belongs to the
segment before it; a longer part without a label, or with a null label for one of the rivals, is a tie.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.data.encoding.geometry import Cut
from diffalign.errors import UserError

Segments = tuple[tuple[float, ...], ...]
"""K rows of S scores, higher is better; NaN where there is none."""

_SLACK = 1e-6  # of a segment: tolerance that puts a frame at its beginning into it despite rounding


def segment_count(length: float, seconds: float) -> int:
    """Return the number of segments of a clip of this length (in seconds), at least 1: a last part counts if
    it is at least half a segment.
    """
    return max(1, math.floor(length / seconds + 0.5 + _SLACK))


@dataclass(frozen=True)
class Dense:
    """The dense label of a group.

    Attributes:
        scores: K rows of S scores, of the segments within the clip, without gaps.
        shown: for each latent frame the segments of the frames that it is made of.
        beyond: number of segments after the clip's end, which were left out.
        missing: number of segments without a label.
    """

    scores: Segments
    shown: tuple[tuple[int, ...], ...]
    beyond: int = 0
    missing: int = 0

    @property
    def tied(self) -> int:
        """Number of segments without a winner, those without a label included."""
        return sum(min(rivals) == max(rivals) for rivals in zip(*self.scores, strict=True))

    def per_frame(self, video: int) -> list[float]:
        """Return the score of each latent frame of a video of the group."""
        row = self.scores[video]
        return [sum(row[segment] for segment in made) / len(made) for made in self.shown]

    def of(self, videos: Sequence[int]) -> "Dense | None":
        """Return the label of some videos of the group; a single one has none."""
        if len(videos) < 2:
            return None
        return Dense(tuple(self.scores[video] for video in videos), self.shown, self.beyond, self.missing)


def dense_from(row: Mapping[str, Any] | None) -> Dense | None:
    """Return a Dense of its json; KeyError or TypeError if it is none."""
    if row is None:
        return None
    tuples = {name: tuple(map(tuple, row[name])) for name in ("scores", "shown")}
    return Dense(**tuples, beyond=row["beyond"], missing=row["missing"])


def dense_of(
    segments: Segments, seconds: float, cut: Cut, latent_frames: int, frames_of: Callable[[int], range]
) -> Dense:
    """Return the dense label of a group with this cut.

    Args:
        segments: as they are written down.
        seconds: of each.
        cut: of the videos: how many frames, how many a second.
        latent_frames: of the clip.
        frames_of: the frames that a latent frame is made of.
    """
    at = [math.floor(frame / cut.fps / seconds + _SLACK) for frame in range(cut.frames)]
    given = len(segments[0])
    if segment_count(cut.frames / cut.fps, seconds) <= given:
        at = [min(segment, given - 1) for segment in at]
    count = at[-1] + 1
    told = [s < given and all(math.isfinite(row[s]) for row in segments) for s in range(count)]
    scores = tuple(tuple(row[s] if told[s] else 0.0 for s in range(count)) for row in segments)
    shown = tuple(tuple(at[frame] for frame in frames_of(k)) for k in range(latent_frames))
    return Dense(scores, shown, max(0, given - count), told.count(False))


def read_segments(value: Any, where: str, videos: int) -> Segments:
    """Return the ``segments`` of a row, () where there are none; UserError for what is no dense label."""
    if value is None:
        return ()

    def listed(item: Any) -> bool:
        return isinstance(item, Sequence) and not isinstance(item, str | bytes)

    rows = list(value) if listed(value) and all(map(listed, value)) else []
    numbers = all(
        score is None or (isinstance(score, int | float) and math.isfinite(score))
        for row in rows
        for score in row
    )
    if len(rows) != videos or not numbers or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise UserError(
            f"{where}: segments is {str(value)[:60]}; allowed: for each of the {videos} videos a list of "
            "scores, equally long, null where there is none"
        )
    if videos < 2:
        raise UserError(f"{where}: segments of a single video; they say which of several is better, and when")
    return tuple(tuple(math.nan if score is None else float(score) for score in row) for row in rows)


def read_seconds(value: Any, where: str) -> float | None:
    """Return the ``segment_seconds`` of a row; UserError for what is no length."""
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UserError(f"{where}: segment_seconds is {value!r}; allowed: a number of seconds above 0")
    return float(value)


def overall(segments: Segments) -> tuple[float, ...] | None:
    """Return each video's mean over the segments that have a label for all; None if none has."""
    whole = [rivals for rivals in zip(*segments, strict=True) if all(map(math.isfinite, rivals))]
    return tuple(sum(row) / len(whole) for row in zip(*whole, strict=True)) if whole else None


def is_dense_tie(segments: Segments) -> bool:
    """Return whether no segment has a winner; a segment without a label has none."""
    return all(
        min(rivals) == max(rivals) or any(map(math.isnan, rivals)) for rivals in zip(*segments, strict=True)
    )


def turn_segments(segments: Segments) -> Segments:
    """Return the flipped labels of every segment; ties and gaps are unchanged."""
    columns = [
        at if any(map(math.isnan, at)) else tuple(max(at) + min(at) - score for score in at)
        for at in zip(*segments, strict=True)
    ]
    return tuple(zip(*columns, strict=True))
