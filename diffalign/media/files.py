"""Images and videos in memory or in files that are opened on demand."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffalign.errors import UserError
from diffalign.media.frames import frame_image
from diffalign.media.images import UNREADABLE, decode, read_file, to_rgb, why_unreadable
from diffalign.media.videos import VIDEO_SUFFIXES, Video, read_video, write_video
from diffalign.utils.files import open_atomic

Media = Image.Image | Video
MediaLike = Media | Path


def is_video(source: MediaLike | str) -> bool:
    """Return whether ``source`` is a video, or a file with a video's suffix."""
    if isinstance(source, Path | str):
        return Path(source).suffix.lower() in VIDEO_SUFFIXES
    return isinstance(source, Video)


def all_videos(sources: Sequence[MediaLike]) -> bool:
    """Return whether all sources are videos.

    Raises:
        UserError: some are videos and others are images.
    """
    videos = [is_video(source) for source in sources]
    if any(videos) and not all(videos):
        raise UserError(
            f"{sum(videos)} videos among {len(videos) - sum(videos)} images; allowed: one kind or the other"
        )
    return any(videos)


def open_image(source: Image.Image | Path | str) -> Image.Image:
    """Return an image, or the image in a file, in RGB.

    Raises:
        UserError: the file cannot be read; it names the file.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    try:
        return decode(read_file(source))
    except UNREADABLE as error:
        raise UserError(f"cannot read the image {str(source)!r}: {why_unreadable(error)}") from error


def open_media(source: MediaLike | str) -> Media:
    """Return an image in RGB or a video, reading it if ``source`` is a file.

    Raises:
        UserError: the file cannot be read; it names the file.
    """
    if isinstance(source, Video):
        return source
    if isinstance(source, Path | str) and is_video(source):
        return read_video(source)
    return open_image(source)


def still(source: MediaLike) -> Image.Image:
    """Return the image, or the middle frame of a video."""
    media = open_media(source)
    return frame_image(media, len(media.frames) // 2) if isinstance(media, Video) else media


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with open_atomic(path) as file:
        image.save(file, format="PNG")


def save_media(media: Media, path: Path) -> None:
    """Write an image as PNG or a video as mp4, atomically."""
    if isinstance(media, Video):
        write_video(media, path)
    else:
        save_image(media, path)
