"""Rewards of videos: those of whole videos, and rewards of images on some of their frames.

``takes_videos(load(spec))`` scores B ``Video``s whatever the spec names. A reward of images gives the mean of
its scores of ``FRAMES`` frames, the middles of as many equal parts: it sees what the video shows and not how
it moves.
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
from diffalign.types import Reward

FRAMES = 8


def needs_videos(name: str) -> UserError:
    """Return what to say where a reward of videos is given images."""
    return UserError(
        f"reward {name!r} judges videos, and these are images; allowed: a reward of images (`diffalign "
        "rewards` says which are)"
    )


@dataclass(frozen=True)
class VideoReward:
    """A reward that watches videos: what ``rewards.load`` gives for a card that says so.

    Attributes:
        name: of the card.
        score: B videos and their prompts to (B,) scores.
    """

    name: str
    score: Callable[[Sequence[Video], Sequence[str]], Tensor]

    def __call__(self, videos: Any, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """(B,) float32; UserError for what is no video."""
        if isinstance(videos, Tensor) or not all(isinstance(video, Video) for video in videos):
            raise needs_videos(self.name)
        return self.score(videos, prompts).float()


@dataclass(frozen=True)
class MeanOverFrames:
    """A reward of images as one of videos.

    Attributes:
        reward: of images.
        frames: at most so many of a video, evenly spaced.
    """

    reward: Reward
    frames: int = FRAMES

    def __call__(self, videos: Sequence[Video], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """(B,) float32: the mean over frames."""
        images, words, counts = [], [], []
        for video, prompt in zip(videos, prompts, strict=True):
            indices = evenly_spaced(len(video.frames), self.frames)
            images += [frame_image(video, index) for index in indices]
            words += [prompt] * len(indices)
            counts.append(len(indices))
        if not images:
            return torch.zeros(0)
        scores = self.reward(images, words).float()
        return torch.stack([part.mean() for part in scores.split(counts)])


def takes_videos(reward: Reward, frames: int = FRAMES) -> Reward:
    """Return the reward as one of videos; ``frames`` is for rewards of images."""
    return reward if isinstance(reward, VideoReward | MeanOverFrames) else MeanOverFrames(reward, frames)
