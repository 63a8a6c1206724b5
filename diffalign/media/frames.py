"""Choose evenly spaced frames of a video; convert a frame to an image."""

from PIL import Image

from diffalign.media.videos import Video


def evenly_spaced(count: int, number: int) -> list[int]:
    """Return the indices of ``number`` evenly spaced frames of ``count``: the middles of equal parts.

    If ``count`` is smaller than ``number``, all indices are returned.

    Raises:
        ValueError: ``count`` or ``number`` is below 1.
    """
    if count < 1 or number < 1:
        raise ValueError(f"{number} of {count} frames: there must be at least one of each")
    number = min(count, number)
    return [(2 * part + 1) * count // (2 * number) for part in range(number)]


def frame_image(video: Video, index: int) -> Image.Image:
    """Return one frame as an image."""
    return Image.fromarray(video.frames[index].permute(1, 2, 0).contiguous().cpu().numpy())
