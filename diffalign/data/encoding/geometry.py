"""Crops and frames of images and videos, chosen once for a group, from sizes, rates and lengths alone.

Every image of a group is resized to cover the group's common target and cut at the same relative place.
SDXL's conditions on it (Podell et al. 2023, arXiv 2307.01952, section 2.2: original size and top-left corner
of the crop) are those of each image. Sizes are (height, width) in pixels throughout.

Videos of a group begin together at their first frames, are read at one rate and have one number of frames.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from diffalign.config.schema import DataConfig
from diffalign.diffusion.randomness import derive
from diffalign.media.videos import Probe

Size = tuple[int, int]

MAX_RATIO = 2.0  # of the sides of a bucket


@dataclass(frozen=True)
class Cut:
    """The resize and crop of an image to the target size.

    Attributes:
        original: size of the image as it is displayed.
        resized: size after resizing; covers the target.
        corner: (top, left) of the crop in the resized image.
        target: size of the crop.
        frames: of a video; 0 for an image.
        fps: frames a second that a video is read at; 0 for an image.
    """

    original: Size
    resized: Size
    corner: Size
    target: Size
    frames: int = 0
    fps: float = 0.0

    @property
    def seconds(self) -> float:
        """Length of the clip in seconds, its last frame included; 0 for an image."""
        return self.frames / self.fps if self.frames else 0.0

    @property
    def mirrored_corner(self) -> Size:
        """(top, left) of the same crop in the mirrored image."""
        return self.corner[0], self.resized[1] - self.target[1] - self.corner[1]


def cuts(sizes: Sequence[Size], config: DataConfig, content: str) -> tuple[Cut, ...]:
    """Return one Cut for each image of a group, with the same target and the same relative crop.

    ``config.crop == "random"`` draws the place once for the group, by its ``content`` (a digest), so that a
    repeated encoding is the same.
    """
    target = bucket_of(sizes, config) if config.buckets else size_of(config)
    return tuple(cut_to(size, target, place_of(config, content)) for size in sizes)


def place_of(config: DataConfig, content: str) -> tuple[float, float]:
    """Return where the crops of a group lie, 0 to 1 from the top and from the left; see ``cuts``."""
    if config.crop != "random":
        return 0.5, 0.5
    return derive(0, "crop", "top", content) / 2**63, derive(0, "crop", "left", content) / 2**63


def size_of(config: DataConfig) -> Size:
    """Return the (height, width) of all crops where there are no buckets."""
    return config.height or config.resolution, config.width or config.resolution


def clips(
    videos: Sequence[Probe], config: DataConfig, content: str, usable: Callable[[int], int]
) -> tuple[Cut, ...] | None:
    """Return one Cut for each video of a group, as ``cuts``: of the frames that all have, at most
    ``config.frames``, and a number that the model accepts.

    ``usable`` gives the largest usable number that is at most its argument. Without ``config.fps`` the rate
    is the first video's. None where a video has no frame, or only one where more are configured.
    """
    fps = config.fps or videos[0].fps
    common = min(video.length(fps) for video in videos)
    frames = usable(min(common, config.frames or common)) if common else 0
    if frames < min(2, config.frames or 2):
        return None
    sizes = [(video.height, video.width) for video in videos]
    return tuple(replace(cut, frames=frames, fps=fps) for cut in cuts(sizes, config, content))


def cut_to(size: Size, target: Size, place: tuple[float, float] = (0.5, 0.5)) -> Cut:
    """Return how an image of ``size`` is made to cover ``target`` and cut at a relative place."""
    scale = max(target[0] / size[0], target[1] / size[1])
    resized = (max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale)))
    corner = (round(place[0] * (resized[0] - target[0])), round(place[1] * (resized[1] - target[1])))
    return Cut(size, resized, corner, target)


def buckets(resolution: int, step: int) -> list[Size]:
    """Sizes of at most resolution^2 pixels, widest first.

    Sides are multiples of ``step``, and one is at most twice the other.
    """
    found = set()
    shortest = resolution / math.sqrt(MAX_RATIO) - step / 2  # 1:2 at the full area, rounded to the grid
    for short in range(step, resolution + 1, step):
        if short >= shortest:
            longest = min(resolution * resolution // short, int(MAX_RATIO * short)) // step * step
            found |= {(short, longest), (longest, short)}
    return sorted(found, key=lambda size: size[0] / size[1])


def bucket_of(sizes: Sequence[Size], config: DataConfig) -> Size:
    """Return the bucket nearest to the mean log aspect (height over width) of a group's images."""
    aspect = sum(math.log(height / width) for height, width in sizes) / len(sizes)
    return min(
        buckets(config.resolution, config.bucket_step),
        key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size),
    )
