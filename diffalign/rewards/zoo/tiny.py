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
from diffalign.tiny import motion_judge, motions, pattern_judge, scenes
from diffalign.tiny import patterns as patterned

Parse = Callable[[str], object]
"""Parses a caption; ValueError for a text that is none."""

_DRAWN = "drawn scenes, such as those of diffalign.tiny.prompts"
_PATTERNS = "patterned scenes, such as those of tiny:patterns/train"
_MOTIONS = "moving shapes, such as those of tiny:motions/train"


def _parsed(name: str, parse: Parse, known: str, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        try:
            parse(prompt)
        except ValueError as error:
            raise UserError(
                f"reward {name!r} cannot read the prompt {prompt!r} ({error}); it only knows captions of "
                f"{known}: use another reward for other prompts"
            ) from error


@dataclass(frozen=True)
class SceneJudge:
    """A reward on a rule ``(image, prompt) -> float`` for drawn images.

    Attributes:
        name: name of the reward.
        rule: scores an image in [0, 1].
        batch_size: images converted at once.
        parse: parses a caption; None: the rule ignores captions.
        known: what captions describe, for the error.
    """

    name: str
    rule: Callable[[Image.Image, str], float]
    batch_size: int = 16
    parse: Parse | None = None
    known: str = _DRAWN

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError, which names the prompt, if the judge cannot parse one."""
        if self.parse is not None:
            _parsed(self.name, self.parse, self.known, prompts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) in [0, 1], float32.

        Raises:
            UserError: the judge cannot parse a prompt; it names the prompt.
        """
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        self.check_prompts(prompts)
        pairs = zip(to_pil(images), prompts, strict=True)
        return torch.tensor([float(self.rule(image, prompt)) for image, prompt in pairs])


def judge(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of agreement: the fraction of the caption's statements that hold."""
    no_source("judge", source)
    return SceneJudge("judge", judges.judge, place.batch_size, scenes.parse_things)


def taste(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of colour vividness, which ignores the caption."""
    no_source("taste", source)
    return SceneJudge("taste", judges.taste, place.batch_size)


def patterns(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of agreement of patterned scenes."""
    no_source("pattern_judge", source)
    return SceneJudge("pattern_judge", pattern_judge.judge, place.batch_size, patterned.parse, _PATTERNS)


def light(source: str | None, place: Place) -> SceneJudge:
    """Return the reward of a lit background of patterned scenes, which ignores the caption."""
    no_source("pattern_taste", source)
    return SceneJudge("pattern_taste", pattern_judge.taste, place.batch_size)


@dataclass(frozen=True)
class MotionJudge:
    """A reward on a rule ``(frames, prompt, fps) -> float`` for moving shapes.

    Attributes:
        name: name of the reward.
        rule: scores a video.
    """

    name: str
    rule: Callable[[np.ndarray, str, float], float]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError, which names the prompt, if the judge cannot parse one."""
        _parsed(self.name, motions.parse, _MOTIONS, prompts)

    def __call__(self, videos: Sequence[Video], prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32.

        Raises:
            UserError: the judge cannot parse a prompt; it names the prompt.
        """
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts: there must be one each")
        self.check_prompts(prompts)
        return torch.tensor([self._one(v, p) for v, p in zip(videos, prompts, strict=True)])

    def _one(self, video: Video, prompt: str) -> float:
        return self.rule(video.frames.permute(0, 2, 3, 1).cpu().numpy(), prompt, video.fps)


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
