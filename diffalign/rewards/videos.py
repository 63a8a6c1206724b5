"""Video rewards, and image rewards applied to frames of videos.

``takes_videos(load(spec))`` scores B ``Video``s for any spec. An image reward scores ``FRAMES`` frames (the
middles of as many equal parts of the video) and returns the mean, which does not measure motion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.media.frames import evenly_spaced, frame_image
from diffalign.media.videos import Video
from diffalign.rewards.prompt_checks import check_prompts
from diffalign.types import Reward

FRAMES = 8


def needs_videos(name: str) -> UserError:
    """Return the error for a video reward that was given images."""
    return UserError(
        f"reward {name!r} judges videos, and these are images; allowed: a reward of images (`diffalign "
        "rewards` says which are)"
    )


@dataclass(frozen=True)
class VideoReward:
    """A reward of videos; ``rewards.load`` returns one for a card with ``video=True``.

    Attributes:
        name: name of the card.
        score: maps B videos and their prompts to scores (B,).
    """

    name: str
    score: Callable[[Sequence[Video], Sequence[str]], Tensor]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that cannot be scored."""
        check_prompts(self.score, prompts)

    def __call__(self, videos: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,), float32.

        Raises:
            UserError: an item of ``videos`` is no ``Video``.
        """
        if isinstance(videos, Tensor) or not all(isinstance(video, Video) for video in videos):
            raise needs_videos(self.name)
        return self.score(videos, prompts).float()


@dataclass(frozen=True)
class MeanOverFrames:
    """An image reward applied to videos: the mean of its scores over frames.

    Attributes:
        reward: the image reward.
        frames: largest number of frames of a video that are scored, evenly spaced.
    """

    reward: Reward
    frames: int = FRAMES

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that cannot be scored."""
        check_prompts(self.reward, prompts)

    def __call__(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,), float32: means over frames."""
        images, frame_prompts, counts = [], [], []
        for video, prompt in zip(videos, prompts, strict=True):
            indices = evenly_spaced(len(video.frames), self.frames)
            images += [frame_image(video, index) for index in indices]
            frame_prompts += [prompt] * len(indices)
            counts.append(len(indices))
        if not images:
            return torch.zeros(0)
        scores = self.reward(images, frame_prompts).float()
        return torch.stack([part.mean() for part in scores.split(counts)])


def to_videos(pixels: Float[Tensor, "B 3 F H W"], fps: float) -> list[Video]:
    """Return pixels in [0, 1] as videos of ``fps`` frames a second, rounded to 8 bits."""
    frames = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Video(video.transpose(0, 1).contiguous(), fps) for video in frames.cpu()]


def takes_videos(reward: Reward, frames: int = FRAMES) -> Reward:
    """Return a reward of videos: ``reward`` itself, or an image reward's mean over ``frames`` frames."""
    return reward if isinstance(reward, VideoReward | MeanOverFrames) else MeanOverFrames(reward, frames)
