"""Frames of a video: evenly spaced indices, and one frame as an image."""

from PIL import Image

from diffalign.media.videos import Video


def evenly_spaced(count: int, number: int) -> list[int]:
    """Return the middles of ``number`` equal parts of ``count`` frames; all of them where they are fewer.

    Raises:
        ValueError: fewer than one of either.
    """
    if count < 1 or number < 1:
        raise ValueError(f"{number} of {count} frames: there must be at least one of each")
    number = min(count, number)
    return [(2 * part + 1) * count // (2 * number) for part in range(number)]


def frame_image(video: Video, index: int) -> Image.Image:
    """Return one frame as an image."""
    return Image.fromarray(video.frames[index].permute(1, 2, 0).contiguous().cpu().numpy())
