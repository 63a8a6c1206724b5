"""Rewards on the rule-based judges of diffalign.tiny: of drawn scenes, patterned scenes, moving shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place, no_source
from diffalign.tiny import judge as judges
from diffalign.tiny import motion_judge, pattern_judge


@dataclass(frozen=True)
class SceneJudge:
    """A reward on a rule ``(image, prompt) -> float`` for drawn images; ``known`` names their captions."""

    name: str
    rule: Callable[[Image.Image, str], float]
    batch_size: int = 16
    known: str = "drawn scenes, such as those of diffalign.tiny.prompts"

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) in [0, 1], float32.

        Raises:
            UserError: the judge cannot parse a prompt; it names the prompt.
        """
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        return torch.tensor(
            [self._one(image, prompt) for image, prompt in zip(to_pil(images), prompts, strict=True)]
        )

    def _one(self, image: Image.Image, prompt: str) -> float:
        try:
            return float(self.rule(image, prompt))
        except ValueError as error:
            raise UserError(
                f"reward {self.name!r} cannot read the prompt {prompt!r} ({error}); it only knows captions "
                f"of {self.known}: use another reward for other prompts"
            ) from error


def judge(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of agreement: the fraction of the caption's statements that hold."""
    no_source("judge", source)
    return SceneJudge("judge", judges.judge, place.batch_size)


def taste(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of colour vividness, which ignores the caption."""
    no_source("taste", source)
    return SceneJudge("taste", judges.taste, place.batch_size)


_PATTERNS = "patterned scenes, such as those of tiny:patterns/train"


def patterns(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of agreement of patterned scenes."""
    no_source("pattern_judge", source)
    return SceneJudge("pattern_judge", pattern_judge.judge, place.batch_size, _PATTERNS)


def light(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of a lit background of patterned scenes, which ignores the caption."""
    no_source("pattern_taste", source)
    return SceneJudge("pattern_taste", pattern_judge.taste, place.batch_size, _PATTERNS)


@dataclass(frozen=True)
class MotionJudge:
    """A reward on a rule ``(frames, prompt, fps) -> float`` for moving shapes."""

    name: str
    rule: Callable[[np.ndarray, str, float], float]

    def __call__(self, videos: Sequence[Video], prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32.

        Raises:
            UserError: the judge cannot parse a prompt; it names the prompt.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts: there must be one each")
        return torch.tensor([self._one(v, p) for v, p in zip(videos, prompts, strict=True)])

    def _one(self, video: Video, prompt: str) -> float:
        try:
            return self.rule(video.frames.permute(0, 2, 3, 1).cpu().numpy(), prompt, video.fps)
        except ValueError as error:
            raise UserError(
                f"reward {self.name!r} cannot read the prompt {prompt!r} ({error}); it only knows captions "
                "of moving shapes, such as those of tiny:motions/train: use another reward for other prompts"
            ) from error


def video_content(source: str | None, place: Place) -> MotionJudge:
    """Return the reward of number, colours and shapes in all frames."""
    no_source("video_content", source)
    return MotionJudge("video_content", motion_judge.content)


def video_motion(source: str | None, place: Place) -> MotionJudge:
    """Return the reward of direction, speed and evenness of motion."""
    no_source("video_motion", source)
    return MotionJudge("video_motion", motion_judge.motion)


def video_dynamics(source: str | None, place: Place) -> MotionJudge:
    """Return the reward of speed, in pixels a second."""
    no_source("video_dynamics", source)
    return MotionJudge("video_dynamics", motion_judge.dynamics)
