"""Video files to frames and back, by PyAV (the extra ``diffalign[video]``).

Frames are found by presentation time, so that constant and variable frame rates are read alike: frame k of a
video read at some rate is the one shown nearest to k / rate seconds after the first. Only whole frames count:
126 frames at 24 a second (5.25 s) are 105 at 20. What a container says about rotation is applied,
transparency is laid over white, animated GIFs are videos.
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
"""Suffixes of videos where a set is one of videos: GIF is also a format of images."""

_QUALITY = "16"  # of x264: constant rate factor, without visible loss
_SLACK = 1e-3  # of a frame: rates such as 30000 / 1001 are no round numbers
_TIE = 1e-6  # seconds: of two frames that are equally near the earlier one is taken


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of one size.

    Attributes:
        frames: (F, 3, H, W) uint8.
        fps: frames a second.
    """

    frames: UInt8[Tensor, "F 3 H W"]
    fps: float


@dataclass(frozen=True)
class Probe:
    """Size, length and rate of a video file, known without decoding it.

    Attributes:
        frames: their number.
        fps: frames a second, the average where it varies.
        height: of a frame as displayed, in pixels.
        width: likewise.
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
        """Frames that ``read_video`` finds from ``start`` seconds on at another rate; 0 if it is shorter."""
        left = self.seconds - start
        return max(1, math.floor(left * (fps or self.fps) + _SLACK)) if left > 0 else 0


@dataclass(frozen=True)
class _Shown:
    """A stream's frames: their number, rate, time of the first (seconds), rotation in quarter turns."""

    frames: int
    fps: float
    first: float
    turns: int


def begins_as_video(content: bytes) -> bool:
    """Whether a file's first bytes are a video's: mp4 and mov, Matroska and WebM, AVI."""
    return content[4:8] == b"ftyp" or content[:4] == b"\x1aE\xdf\xa3" or content[8:12] == b"AVI "


def need_av() -> Any:
    """Import PyAV; UserError that says how to install it."""
    try:
        import av
    except ImportError as error:
        raise UserError('videos need PyAV; pip install "diffalign[video]"') from error
    return av


def probe(source: Source) -> Probe:
    """Return what a video file (a path, or its bytes) holds.

    Raises:
        UserError: no video, or one that ends early; PyAV is missing.
    """
    shown, (height, width) = _look(source)
    return Probe(shown.frames, shown.fps, height, width)


def read_video(
    source: Source, fps: float | None = None, frames: int | None = None, start: float = 0.0
) -> Video:
    """Return the frames of a video file, of a path or of its bytes.

    Args:
        source: the file.
        fps: frames a second of the result; None: as it was filmed.
        frames: at most so many; None: all.
        start: seconds after the first frame to begin at.

    Raises:
        UserError: no video, one that ends early or is damaged, or that is over before ``start``; it names the
            path. PyAV is missing.
    """
    rate = fps or probe(source).fps
    pixels = read_frames(source, channels_first, rate, frames, start)
    return Video(pixels, rate)


def read_frames(
    source: Source,
    each: Callable[[np.ndarray], Tensor],
    fps: float | None = None,
    frames: int | None = None,
    start: float = 0.0,
    some: Callable[[int], list[int]] | None = None,
) -> Tensor:
    """As ``read_video``, the frames alone: ``each`` makes a tensor of one (H, W, 3) uint8 as it is decoded,
    so that large videos that are to be small never lie in memory whole; ``some`` says, given how many frames
    there are, the places of those to read, ascending.
    """
    shown, size = _look(source)
    wanted = Probe(shown.frames, shown.fps, *size).length(fps, start)
    if not wanted:
        seconds = shown.frames / shown.fps
        raise UserError(f"{_name(source)} is {seconds:.2f} s long; nothing to read from {start:g} s on")
    wanted = min(wanted, frames or wanted)
    chosen = range(wanted) if some is None else some(wanted)
    times = [start + number / (fps or shown.fps) for number in chosen]
    with _opened(source) as (container, stream):
        return torch.stack([each(_pixels(f, shown.turns)) for f in _nearest(container, stream, shown, times)])


def write_video(video: Video, path: Path | str) -> None:
    """Write a video as H.264 in mp4 (yuv420p, which every player shows), whole or not at all.

    Sides of an odd number of pixels, which the format does not have, get their last row or column twice.

    Raises:
        UserError: no frames; PyAV is missing.
    """
    av = need_av()
    if not len(video.frames):
        raise UserError(f"{path}: a video of no frames")
    frames = video.frames.detach().cpu()
    frames = torch.cat([frames, frames[..., -1:, :]], dim=-2) if frames.shape[-2] % 2 else frames
    frames = torch.cat([frames, frames[..., -1:]], dim=-1) if frames.shape[-1] % 2 else frames
    options = {"movflags": "+faststart"}  # the index in front, for browsers; libav wants a file's name for it
    with open_atomic(Path(path)) as file, av.open(file.name, "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=_fraction(video.fps), options={"crf": _QUALITY})
        stream.height, stream.width = frames.shape[-2:]
        stream.pix_fmt = "yuv420p"
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(_without_rest(av.VideoFrame.from_ndarray(frame, format="rgb24"))))
        container.mux(stream.encode(None))


def _without_rest(frame: Any) -> Any:
    """Return the frame in yuv420p, with zeros in what its memory has beside the picture: the encoder reads
    there, where sides are no multiples of 16, and would make another file each time.
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
    """Return (3, H, W) of (H, W, 3), the layout of ``read_video``."""
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
            if container.format.name.endswith("_pipe"):  # libav's way to read pictures
                raise UserError(f"{_name(source)}: a picture, not a video")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{_name(source)}: no whole video ({why})") from error


def _look(source: Source) -> tuple[_Shown, tuple[int, int]]:
    """Return what the packets say, without decoding more than the first frame; and the size as displayed."""
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
        if not times[-1][1]:  # the last frame is shown as long as the others
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
        if seconds + 2 / fps < (there := _declared_seconds(stream)):
            raise UserError(f"{_name(source)}: the video ends early, after {seconds:.2f} of {there:.2f} s")
        return _Shown(len(times), fps, times[0][0], turns), size


def _time(item: Any) -> float:
    """Return the time of a packet or a frame, in seconds of the stream's clock."""
    return float((item.dts if item.pts is None else item.pts) * item.time_base)


def _declared_seconds(stream: Any) -> float:
    """Return the duration in the header of a Matroska or WebM file, which counts no frames; 0 for others."""
    hours, minutes, seconds = (stream.metadata.get("DURATION") or "0:0:0").split(":")
    return float(hours) * 3600 + float(minutes) * 60 + float(seconds)


def _nearest(container: Any, stream: Any, shown: _Shown, times: list[float]) -> Iterator[Any]:
    """Yield, for each time (ascending, seconds after the first frame), the frame nearest to it."""
    at, before, last = 0, -math.inf, None
    for frame in container.decode(stream):
        now = _time(frame) - shown.first
        while last is not None and times[at] <= (before + now) / 2 + _TIE:
            yield last
            at += 1
            if at == len(times):
                return
        before, last = now, frame
    for _ in times[at:]:
        yield last


def _pixels(frame: Any, turns: int) -> np.ndarray:
    """(H, W, 3) uint8 as displayed."""
    if any(component.is_alpha for component in frame.format.components) or frame.format.has_palette:
        rgba = frame.to_ndarray(format="rgba").astype(np.uint16)
        alpha = rgba[..., 3:]
        pixels = ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        pixels = frame.to_ndarray(format="rgb24")
    turned: np.ndarray = np.ascontiguousarray(np.rot90(pixels, turns))
    return turned
