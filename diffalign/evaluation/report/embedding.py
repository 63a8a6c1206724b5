"""Images and videos inside a page, which fetches nothing and needs no other file."""

import base64
import tempfile
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from diffalign.evaluation.report.grids import embed
from diffalign.media.files import MediaLike, open_media
from diffalign.media.frames import frame_image
from diffalign.media.videos import Video, write_video

LIMIT = 400_000  # bytes of one video in the page
_SIDES = (448, 320, 224, 160)  # pixels of the long side, tried until the limit is kept


def tag(source: MediaLike, alt: str, attributes: str = "") -> str:
    """Return an ``img`` or a ``video`` element with its content in it.

    Args:
        source: the image or video.
        alt: description for screen readers; escaped here.
        attributes: more of them, as HTML.
    """
    media, words = open_media(source), escape(alt, quote=True)
    more = f" {attributes}" if attributes else ""
    if isinstance(media, Image.Image):
        uri, tiny = embed(media)
        size = f'width="{media.width}" height="{media.height}"'  # keeps the layout still while it loads
        return f'<img src="{uri}" alt="{words}" {size} loading="lazy"{more}{_class(tiny)}>'
    poster, tiny = embed(frame_image(media, 0))
    content = _encoded(media, source)
    if content is None:  # a picture says that there is one
        return f'<img src="{poster}" alt="{words} (a frame: too large for the page)"{more}{_class(tiny)}>'
    height, width = media.frames.shape[-2:]
    uri = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    return (
        f'<video src="{uri}" poster="{poster}" aria-label="{words}" width="{width}" height="{height}" '
        f'controls loop muted playsinline preload="none"{more}{_class(tiny)}></video>'
    )


def _class(tiny: bool) -> str:
    return " class=tiny" if tiny else ""


def _encoded(video: Video, source: MediaLike) -> bytes | None:
    """Return the video as mp4 within the limit, at a smaller size if needed; None if no size is small
    enough."""
    small = max(video.frames.shape[-2:]) <= _SIDES[0]
    if small and isinstance(source, Path) and source.suffix.lower() == ".mp4":
        content = source.read_bytes()
        if len(content) <= LIMIT:
            return content
    with tempfile.TemporaryDirectory() as folder:
        for side in _SIDES:
            file = Path(folder, "video.mp4")
            write_video(_within(video, side), file)
            if file.stat().st_size <= LIMIT:
                return file.read_bytes()
    return None


def _within(video: Video, side: int) -> Video:
    """Return the video with its long side brought to ``side``, if it is longer."""
    scale = side / max(video.frames.shape[-2:])
    if scale >= 1:
        return video
    size = [max(2, round(length * scale)) for length in video.frames.shape[-2:]]
    frames = [F.interpolate(f[None].float(), size, mode="area")[0].round() for f in video.frames]
    return Video(torch.stack(frames).to(torch.uint8), video.fps)
