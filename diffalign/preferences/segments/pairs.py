"""Pairs of videos, their segments, and JSON lines of pairs with labels.

A segment is ``seconds`` long (1 in the paper). The shorter video of a pair determines the number of segments;
a remainder counts as a segment if it is at least half as long (81 frames at 16 a second are 5 segments, not
6).
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
"""The better of two videos in a segment; None: no label."""

_SCORES: Mapping[Label, tuple[float | None, float | None]] = {
    "first": (1.0, 0.0),
    "second": (0.0, 1.0),
    "tie": (0.5, 0.5),
    None: (None, None),
}
_SLACK = 1e-6  # tolerance in segments, since rates such as 30000 / 1001 are not exact


class UnreadableError(UserError):
    """A file that is no complete video; its pair is left out and the others are labelled."""


@dataclass(frozen=True)
class Pair:
    """Two videos of one prompt.

    Attributes:
        row: the object of the JSON line.
        where: location of the line, for messages.
        prompt: prompt of both videos.
        paths: paths of both videos.
    """

    row: Mapping[str, Any]
    where: str
    prompt: str
    paths: tuple[Path, Path]

    @property
    def names(self) -> tuple[str, str]:
        """The two files as written in the row."""
        first, second = _named(self.row)
        return str(first), str(second)

    @cached_property
    def content(self) -> str:
        """A digest of both files, which identifies the pair in files of answers."""
        return digest(*(path.read_bytes() for path in self.paths))

    @cached_property
    def length(self) -> float:
        """The length of the shorter video in seconds; UnreadableError if a file is no video."""
        return min(_probe(path).seconds for path in self.paths)

    def segments(self, seconds: float) -> int:
        """Return the number of segments that both videos have, at least 1."""
        return segment_count(self.length, seconds)


def read_pairs(path: str) -> list[Pair]:
    """Read the rows ``{"prompt": ..., "videos": [a, b]}`` of a file of ``diffalign video-pairs``.

    Raises:
        UserError: no such file, a malformed row, or a missing video.
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
    """Return the segments of one video of a pair.

    A frame belongs to the segment of its time; frames after the last segment, up to the end of the shorter
    video, belong to the last one.

    Args:
        pair: the pair.
        video: 0 for the first video, 1 for the second.
        seconds: length of a segment, in seconds.
        count: number of segments.
        fps: frames a second of the result, at most the video's own rate; None: its own rate.
        side: longest side of a frame in pixels; larger frames are downscaled as they are read. None: any.

    Raises:
        UnreadableError: the video is damaged.
        UserError: segments are shorter than a frame.
    """
    path = pair.paths[video]
    native = _probe(path).fps
    rate = min(native, fps or native)
    convert = channels_first if side is None else lambda frame: _downscaled(frame, side)
    with _reading():
        frames = read_frames(path, convert, rate, max(1, round(pair.length * rate)))
    sizes = Counter(
        min(count - 1, math.floor(frame / rate / seconds + _SLACK)) for frame in range(len(frames))
    )
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


def _downscaled(frame: np.ndarray, side: int) -> Tensor:
    image = Image.fromarray(frame)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return channels_first(np.array(image))


def with_labels(pair: Pair, labels: Sequence[Label], seconds: float, by: str) -> dict[str, Any]:
    """Return the pair's row with dense labels, and global ``scores``: each video's share of won segments."""
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
    """Write JSON lines atomically; paths become absolute if the folders of the two files differ."""
    old, new = Path(source).expanduser().resolve().parent, target.resolve().parent
    moved = (row if new == old else _with_absolute_paths(row, old) for row in rows)
    write_atomic(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in moved))


def _with_absolute_paths(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    def absolute(name: str) -> str:
        return str(folder / Path(name).expanduser())

    row = {**row, **{key: absolute(row[key]) for key in ("video_0", "video_1") if key in row}}
    return {**row, "videos": [absolute(name) for name in row["videos"]]} if "videos" in row else row
