"""Read and write video files with PyAV (the extra ``diffalign[video]``).

Frames are selected by presentation time, for constant and variable frame rates alike: frame k of a video read
at a given rate is the one nearest to k / rate seconds after the first. Durations are rounded down to whole
frames: 126 frames at 24 a second (5.25 s) are 105 at 20. A container's rotation is applied, transparent
frames are composited over white, and animated GIFs count as videos.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from diffalign.errors import UserError
from diffalign.media.images import read_file
from diffalign.utils.files import open_atomic

Source = Path | str | bytes

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
"""Suffixes of files that are always videos."""
MOVING_SUFFIXES = (*VIDEO_SUFFIXES, ".gif")
"""Suffixes of videos in a set of videos; elsewhere a GIF is an image."""

_QUALITY = "16"  # constant rate factor of x264, without visible loss
_SLACK = 1e-3  # tolerance in frames, since rates such as 30000 / 1001 are not exact
_TIE = 1e-6  # tolerance in seconds; of two equally near frames the earlier one is taken


@dataclass(frozen=True, eq=False)
class Video:
    """A video in memory.

    Attributes:
        frames: (F, 3, H, W) uint8.
        fps: frames a second.
    """

    frames: UInt8[Tensor, "F 3 H W"]
    fps: float


@dataclass(frozen=True)
class Probe:
    """Size, length and frame rate of a video file, read without decoding all of it.

    Attributes:
        frames: number of frames.
        fps: frames a second; the average for a variable rate.
        height: height of a frame as displayed, in pixels.
        width: width of a frame as displayed, in pixels.
    """

    frames: int
    fps: float
    height: int
    width: int

    @property
    def seconds(self) -> float:
        """Duration in seconds, the last frame included."""
        return self.frames / self.fps

    def length(self, fps: float | None = None, start: float = 0.0) -> int:
        """Return the number of frames at the rate ``fps`` from ``start`` seconds on; 0 beyond the end."""
        left = self.seconds - start
        return max(1, math.floor(left * (fps or self.fps) + _SLACK)) if left > 0 else 0


@dataclass(frozen=True)
class _Stream:
    """A stream: number of frames, rate, time of the first frame in seconds, rotation in quarter turns."""

    frames: int
    fps: float
    first: float
    turns: int


def begins_as_video(content: bytes) -> bool:
    """Return whether a file's first bytes are those of a video: mp4 and mov, Matroska and WebM, AVI."""
    return content[4:8] == b"ftyp" or content[:4] == b"\x1aE\xdf\xa3" or content[8:12] == b"AVI "


def need_av() -> Any:
    """Import PyAV, with its messages off.

    torchvision before 0.26 turns them on. Threads of a codec then call Python for each message and wait for
    its lock, while the thread that holds it waits for them to end: two videos read side by side hang.

    Raises:
        UserError: it is not installed; the message has the command.
    """
    try:
        import av.logging
    except ImportError as error:
        raise UserError('videos need PyAV; pip install "diffalign[video]"') from error
    av.logging.set_level(None)
    return av


def probe(source: Source) -> Probe:
    """Return size, length and frame rate of a video file (a path, or its bytes).

    Raises:
        UserError: it is no video, or truncated; or PyAV is not installed.
    """
    info, (height, width) = _inspect(source)
    return Probe(info.frames, info.fps, height, width)


def read_video(
    source: Source, fps: float | None = None, frames: int | None = None, start: float = 0.0
) -> Video:
    """Read a video file (a path, or its bytes).

    Args:
        source: the file.
        fps: frames a second of the result; None: the file's rate.
        frames: largest number of frames; None: all.
        start: time of the first frame to read, in seconds after the file's first frame.

    Raises:
        UserError: it is no video, truncated or damaged, or ends before ``start``; it names the path. Or PyAV
            is not installed.
    """
    rate = fps or probe(source).fps
    pixels = read_frames(source, channels_first, rate, frames, start)
    return Video(pixels, rate)


def read_frames(
    source: Source,
    convert: Callable[[np.ndarray], Tensor],
    fps: float | None = None,
    frames: int | None = None,
    start: float = 0.0,
    choose: Callable[[int], list[int]] | None = None,
) -> Tensor:
    """Read frames of a video file and stack their conversions.

    Args:
        source: the file: a path, or its bytes.
        convert: maps a decoded frame (H, W, 3) uint8 to a tensor. It runs on each frame as it is decoded, so
            a large video that is to be downscaled is never in memory as a whole.
        fps: frames a second; None: the file's rate.
        frames: largest number of frames; None: all.
        start: time of the first frame to read, in seconds after the file's first frame.
        choose: maps the number of frames to the indices of those to read, ascending; None: all.

    Raises:
        UserError: as ``read_video``.
    """
    info, size = _inspect(source)
    count = Probe(info.frames, info.fps, *size).length(fps, start)
    if not count:
        seconds = info.frames / info.fps
        raise UserError(f"{_name(source)} is {seconds:.2f} s long; nothing to read from {start:g} s on")
    count = min(count, frames or count)
    indices = range(count) if choose is None else choose(count)
    times = [start + index / (fps or info.fps) for index in indices]
    with _opened(source) as (container, stream):
        decoded = _nearest(container, stream, info, times)
        return torch.stack([convert(_pixels(frame, info.turns)) for frame in decoded])


def write_video(video: Video, path: Path | str) -> None:
    """Write a video as H.264 in mp4 (yuv420p, which all players support), atomically.

    The format needs even sides; an odd side is extended by repeating its last row or column.

    Raises:
        UserError: the video has no frames, or PyAV is not installed.
    """
    av = need_av()
    if not len(video.frames):
        raise UserError(f"{path}: a video of no frames")
    frames = video.frames.detach().cpu()
    frames = torch.cat([frames, frames[..., -1:, :]], dim=-2) if frames.shape[-2] % 2 else frames
    frames = torch.cat([frames, frames[..., -1:]], dim=-1) if frames.shape[-1] % 2 else frames
    options = {"movflags": "+faststart"}  # index first, for browsers; libav needs a file name for it
    with open_atomic(Path(path)) as file, av.open(file.name, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=_fraction(video.fps), options={"crf": _QUALITY})
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(_without_rest(av.VideoFrame.from_ndarray(frame, format="rgb24"))))
        container.mux(stream.encode(None))


def _without_rest(frame: Any) -> Any:
    """Convert a frame to yuv420p and zero the padding of its planes.

    Where sides are no multiples of 16 the encoder reads the padding, whose random content would make files
    differ between calls.
    """
    frame = frame.reformat(format="yuv420p")
    for plane in frame.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        rows[:, plane.width :] = 0
        rows[plane.height :] = 0
    return frame


def _fraction(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


def channels_first(frame: np.ndarray) -> Tensor:
    """Convert a frame (H, W, 3) to a tensor (3, H, W), the layout of ``Video.frames``."""
    return torch.from_numpy(frame).permute(2, 0, 1)


def _name(source: Source) -> str:
    return "the video" if isinstance(source, bytes) else str(source)


def _content(source: Source) -> bytes:
    return source if isinstance(source, bytes) else read_file(source)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, Any]]:
    """Yield (container, video stream); an error of libav becomes a UserError that names the file."""
    av = need_av()
    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
            if not container.streams.video:
                raise UserError(f"{_name(source)}: no video in it")
            if container.format.name.endswith("_pipe"):  # libav's demuxers of still images
                raise UserError(f"{_name(source)}: a picture, not a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{_name(source)}: no whole video ({why})") from error


def _inspect(source: Source) -> tuple[_Stream, tuple[int, int]]:
    """Return the stream's properties and its (height, width) as displayed, decoding the first frame only."""
    with _opened(source) as (container, stream):
        first = next(container.decode(stream), None)
        if first is None:
            raise UserError(f"{_name(source)}: a video without frames")
        turns = round((first.rotation or 0) / 90) % 4
        size = (first.width, first.height) if turns % 2 else (first.height, first.width)
    with _opened(source) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size]
        shown = [packet for packet in packets if not packet.is_discard]
        times = sorted((_time(packet), float((packet.duration or 0) * packet.time_base)) for packet in shown)
        seconds = times[-1][0] + times[-1][1] - times[0][0]
        if not times[-1][1]:  # no duration: the last frame lasts as long as the others on average
            seconds *= len(times) / max(1, len(times) - 1)
        declared = float(stream.average_rate or 0)
        fits = declared > 0 and abs(declared * seconds - len(times)) < 0.1  # clocks are coarse
        fps = declared if fits or not seconds else len(times) / seconds
        if not fps:
            raise UserError(f"{_name(source)}: a single picture that says no frame rate")
        if stream.frames > len(packets) or any(packet.is_corrupt for packet in packets):
            of = f" of {stream.frames}" if stream.frames > len(packets) else ""
            raise UserError(f"{_name(source)}: the video ends early, after {len(packets)}{of} frames")
        if stream.codec.name == "gif" and not _content(source).rstrip(b"\0").endswith(b";"):
            raise UserError(f"{_name(source)}: the animation ends early, after {len(packets)} frames")
        if seconds + 2 / fps < (total := _declared_seconds(stream)):
            raise UserError(f"{_name(source)}: the video ends early, after {seconds:.2f} of {total:.2f} s")
        return _Stream(len(times), fps, times[0][0], turns), size


def _time(item: Any) -> float:
    """Return the time of a packet or a frame, in seconds of the stream's clock."""
    return float((item.dts if item.pts is None else item.pts) * item.time_base)


def _declared_seconds(stream: Any) -> float:
    """Return the duration in the header of a Matroska or WebM file, which counts no frames; 0 for others."""
    hours, minutes, seconds = (stream.metadata.get("DURATION") or "0:0:0").split(":")
    return float(hours) * 3600 + float(minutes) * 60 + float(seconds)


def _nearest(container: Any, stream: Any, info: _Stream, times: list[float]) -> Iterator[Any]:
    """Yield the nearest frame to each time (ascending, in seconds after the first frame)."""
    index, previous_time, previous = 0, -math.inf, None
    for frame in container.decode(stream):
        time = _time(frame) - info.first
        while previous is not None and times[index] <= (previous_time + time) / 2 + _TIE:
            yield previous
            index += 1
            if index == len(times):
                return
        previous_time, previous = time, frame
    for _ in times[index:]:
        yield previous


def _pixels(frame: Any, turns: int) -> np.ndarray:
    """Return a frame's pixels as displayed, (H, W, 3) uint8."""
    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        pixels = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    rotated: np.ndarray = np.ascontiguousarray(np.rot90(pixels, turns))
    return rotated
