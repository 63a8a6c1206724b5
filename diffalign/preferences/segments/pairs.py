"""Pairs of videos cut into segments, and their json lines with labels.

A segment is ``seconds`` long, 1 as published. Two videos of unequal length have the segments of the shorter
one; a last stretch counts from half a segment on (81 frames at 16 a second are 5 segments, not 6).
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from diffalign.data.reading.dense import segment_count
from diffalign.data.reading.examples import digest
from diffalign.data.reading.json_files import json_rows
from diffalign.errors import UserError
from diffalign.media.videos import Probe, Video, channels_first, probe, read_frames
from diffalign.utils.files import write_atomic

Label = Literal["first", "second", "tie"] | None
"""The better of the two videos in a segment; None without a label."""

_SCORES: Mapping[Label, tuple[float | None, float | None]] = {
    "first": (1.0, 0.0),
    "second": (0.0, 1.0),
    "tie": (0.5, 0.5),
    None: (None, None),
}
_SLACK = 1e-6  # of a segment: rates such as 30000 / 1001 are no round numbers


class UnreadableError(UserError):
    """A file that is no whole video: its pair is left out, and the others go on."""


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt.

    Attributes:
        row: what the json line says.
        where: the line, for messages.
        prompt: of both.
        paths: where they lie.
    """

    row: Mapping[str, Any]
    where: str
    prompt: str
    paths: tuple[Path, Path]

    @property
    def names(self) -> tuple[str, str]:
        """The two files as the row has them."""
        first, second = _named(self.row)
        return str(first), str(second)

    @cached_property
    def content(self) -> str:
        """A digest of both files: the pair's name in files of answers, wherever it lies."""
        return digest(*(path.read_bytes() for path in self.paths))

    @cached_property
    def length(self) -> float:
        """Seconds of the shorter video; UnreadableError for a file that is no video."""
        return min(_probe(path).seconds for path in self.paths)

    def segments(self, seconds: float) -> int:
        """Return the number of segments that both videos have, at least 1."""
        return segment_count(self.length, seconds)


def read_pairs(path: str) -> list[Pair]:
    """Return the rows ``{"prompt": ..., "videos": [a, b]}`` of a file, as ``diffalign video-pairs`` writes
    them.

    Raises:
        UserError: no such file, a row of another kind, or a video that is not there.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path!r}: no such file; allowed: json lines of prompt and videos")
    pairs = []
    for where, row in json_rows(file):
        names = _named(row)
        named = isinstance(names, list) and len(names) == 2 and all(isinstance(n, str) for n in names)
        prompt = row.get("prompt", row.get("caption"))
        if not named or not isinstance(prompt, str):
            raise UserError(
                f'{where}: needed {{"prompt": text, "videos": [first, second]}}; found {", ".join(row)}'
            )
        first, second = (file.parent / Path(name).expanduser() for name in names)
        for video in (first, second):
            if not video.is_file():
                raise UserError(f"{where}: no such file: {video}")
        pairs.append(Pair(row, where, prompt, (first, second)))
    return pairs


def _named(row: Mapping[str, Any]) -> Any:
    return row.get("videos", [row.get("video_0"), row.get("video_1")])


def cut(
    pair: Pair, video: int, seconds: float, count: int, fps: float | None = None, side: int | None = None
) -> list[Video]:
    """Return the ``count`` segments of a pair's first (0) or second video, at its own frame rate, or ``fps``
    where that is lower; frames are made smaller as they are read where they have more than ``side`` pixels a
    side.

    A frame belongs to the segment that it is shown in, and to the last one beyond that, up to the end of the
    shorter video.

    Raises:
        UnreadableError: a damaged video.
        UserError: segments that are too short for a frame.
    """
    path = pair.paths[video]
    own = _probe(path).fps
    rate = min(own, fps or own)
    each = channels_first if side is None else lambda frame: _small(frame, side)
    with _reading():
        frames = read_frames(path, each, rate, max(1, round(pair.length * rate)))
    at = [min(count - 1, math.floor(frame / rate / seconds + _SLACK)) for frame in range(len(frames))]
    sizes = Counter(at)
    if len(sizes) < count:
        raise UserError(f"{path}: {rate:g} frames a second; allowed: segments of at least {1 / rate:g} s")
    parts = frames.split([sizes[segment] for segment in range(count)])
    return [Video(part, rate) for part in parts]


def _probe(path: Path) -> Probe:
    with _reading():
        return probe(path)


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UnreadableError(str(error)) from error


def _small(frame: np.ndarray, side: int) -> Tensor:
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return channels_first(np.array(image))


def with_labels(pair: Pair, labels: Sequence[Label], seconds: float, by: str) -> dict[str, Any]:
    """Return the pair's json with dense labels, and the global one that they vote for: shares of segments
    won.
    """
    scores = [_SCORES[label] for label in labels]
    votes = Counter(labels)
    return {
        **pair.row,
        "segments": [[score[video] for score in scores] for video in (0, 1)],
        "segment_seconds": seconds,
        "scores": [votes[winner] / len(labels) for winner in ("first", "second")],
        "labelled_by": by,
    }


def decided(labels: Sequence[Label]) -> float:
    """Return the share of segments that have a winner."""
    return sum(label in ("first", "second") for label in labels) / len(labels)


def write_rows(rows: Iterable[Mapping[str, Any]], source: str, target: Path) -> None:
    """Write json lines atomically; paths of videos are made to hold from where ``target`` lies."""
    there, here = Path(source).expanduser().resolve().parent, target.resolve().parent
    moved = (row if here == there else _moved(row, there) for row in rows)
    write_atomic(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in moved))


def _moved(row: Mapping[str, Any], there: Path) -> dict[str, Any]:
    def absolute(name: str) -> str:
        return str(there / Path(name).expanduser())

    row = {**row, **{key: absolute(row[key]) for key in ("video_0", "video_1") if key in row}}
    return {**row, "videos": [absolute(name) for name in row["videos"]]} if "videos" in row else row
