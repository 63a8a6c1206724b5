"""Measurements of single images and videos: scores, statistics of the pixels, thumbnails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from diffalign.errors import UserError
from diffalign.evaluation.measuring.image_statistics import image_statistics, thumbnail
from diffalign.evaluation.measuring.motion import motion_statistics
from diffalign.media.files import Media, MediaLike, all_videos, open_media
from diffalign.media.frames import evenly_spaced, frame_image
from diffalign.media.videos import Video
from diffalign.rewards.videos import takes_videos
from diffalign.types import Reward

IMAGES, VIDEOS = 32, 4  # files that are open at once
FRAMES_LOOKED_AT = 4  # of a video, whose image statistics are taken


def check_finite(name: str, scores: Sequence[float], prompts: Sequence[str], what: str) -> None:
    """Raise a UserError with the reward and the first prompt whose score is not a finite number."""
    bad = [i for i, score in enumerate(scores) if not np.isfinite(score)]
    if bad:
        raise UserError(f"reward {name!r} gives {scores[bad[0]]} for {what} of {prompts[bad[0]]!r}")


@dataclass(frozen=True)
class Measured:
    """N images or videos: scores and statistics by name, N values each, and their thumbnails."""

    scores: dict[str, list[float]]
    statistics: dict[str, list[float]]
    thumbnails: list[np.ndarray] = field(repr=False)


def measure(
    sources: Sequence[MediaLike], prompts: Sequence[str], rewards: Mapping[str, Reward], bar: tqdm
) -> Measured:
    """Score images or videos and compute their statistics, a chunk at a time; ``bar`` counts them.

    Raises:
        UserError: one cannot be read, images and videos are mixed, or a reward of videos gets images.
    """
    scores: dict[str, list[float]] = {name: [] for name in rewards}
    statistics: dict[str, list[float]] = {}
    thumbnails: list[np.ndarray] = []
    videos = all_videos(sources)
    judges = {name: takes_videos(reward) if videos else reward for name, reward in rewards.items()}
    chunk = VIDEOS if videos else IMAGES
    for start in range(0, len(sources), chunk):
        media = [open_media(source) for source in sources[start : start + chunk]]
        for name, reward in judges.items():
            scores[name] += reward(media, prompts[start : start + chunk]).tolist()
        for one in media:
            values, small = look(one)
            for name, value in values.items():
                statistics.setdefault(name, []).append(value)
            thumbnails.append(small)
        bar.update(len(media))
    return Measured(scores, statistics, thumbnails)


def look(media: Media) -> tuple[dict[str, float], np.ndarray]:
    """Return statistics by name and the thumbnail, (THUMBNAIL, THUMBNAIL, 3), of an image; of a video those
    of its motion and of some frames, with the thumbnails of the frames stacked vertically.
    """
    if not isinstance(media, Video):
        return image_statistics(media), thumbnail(media)
    frames = [frame_image(media, index) for index in evenly_spaced(len(media.frames), FRAMES_LOOKED_AT)]
    found = [image_statistics(frame) for frame in frames]
    means = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
    return means | motion_statistics(media), np.concatenate([thumbnail(frame) for frame in frames])
