"""UnifiedReward-Edit: points for an edit by the published questions, of a model here or at an endpoint.

The models (``CodeGoat24/UnifiedReward-Edit-qwen3vl-8b`` and others) are Qwen2.5-VL and Qwen3-VL with nothing
added, trained on the answers of EditScore and EditReward-Data. Two questions have two numbers from 0 to 25
each in their answers: the success of the edit and the absence of overediting, asked with the source and the
edited image; naturalness and the absence of artifacts, asked with the edited image alone. The published code
stops at the text of the answers. They are combined as in VIEScore (arXiv 2312.14867) and EditScore (arXiv
2509.23909), whose questions these are:

    score = sqrt(min(success, overediting) min(naturalness, artifacts)) / 25.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.place import Place
from diffalign.rewards.registry import REGISTRY
from diffalign.rewards.sources import places_and_options
from diffalign.rewards.zoo.edits import edits_of
from diffalign.rewards.zoo.instructions import refuse_unreadable, template
from diffalign.rewards.zoo.vlm_answers import Answerer, Asked, Unread, open_answerer
from diffalign.utils.http import UnusableError

_NAME = "unified_reward_edit"
_MOST = 25
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_SCORE = re.compile(rf"[\"']?score[\"']?\s*:\s*\[\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\]")
_RESERVED = ("<image>", "<|")  # beginnings of vision-language models' special tokens
_TOKENS = 512  # of an answer, which holds a short reason


@dataclass(frozen=True)
class UnifiedRewardEdit:
    """The reward; ``batch_size`` images at a time."""

    answerer: Answerer
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) from 0 to 1, float32.

        Raises:
            UserError: no usable answer, a prompt without a source image, an empty prompt, or a prompt with a
                special token.
        """
        self.check_prompts(prompts)
        return in_batches(self._score, images, edits_of(_NAME, prompts), self.batch_size)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts that cannot be scored: see ``__call__``."""
        refuse_unreadable(_NAME, prompts, _RESERVED)
        edits_of(_NAME, prompts)

    def _score(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        following, quality = (template(f"{_NAME}_{name}") for name in ("following", "quality"))
        asked = []
        for image, prompt in zip(to_pil(images), prompts, strict=True):
            assert isinstance(prompt, SourcedPrompt)  # as edits_of gives them
            text = following.replace("{text_prompt}", prompt)
            asked += [Asked((prompt.image, image), text, prompt), Asked((image,), quality, prompt)]
        found = self.answerer.ask(asked, worst)
        return torch.tensor([math.sqrt(a * b) for a, b in zip(found[::2], found[1::2], strict=True)]) / _MOST


def worst(answer: str) -> float:
    """Return the lower of the two numbers of an answer.

    Raises:
        UnusableError: there are none, or one is outside 0 to 25.
    """
    matches = _SCORE.findall(answer)
    if not matches:
        raise UnusableError('an answer without "score" : [number, number]')
    both = [float(number) for number in matches[-1]]
    if not 0 <= min(both) <= max(both) <= _MOST:
        raise UnusableError(f"the score is {both}, outside 0 to {_MOST}")
    return min(both)


def load(source: str | None, place: Place) -> UnifiedRewardEdit:
    """Return the reward of a folder or hub id, or of ADDRESS@MODEL; this sends no request.

    Raises:
        UserError: an invalid address, no model, or a model that cannot be loaded.
    """
    (where, model), _ = places_and_options(_NAME, source, 2, ())
    where = where or REGISTRY[_NAME].checkpoint
    return UnifiedRewardEdit(open_answerer(Unread(_NAME), where, model, _TOKENS, place), place.batch_size)
