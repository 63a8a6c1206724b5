"""UnifiedReward 2.0: points for alignment, coherence and style, of an image or of one against another.

Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236, release
2.0. The models (``CodeGoat24/UnifiedReward-2.0-qwen3vl-8b`` and others) are Qwen2.5-VL, Qwen3-VL and Qwen3.5
with nothing added, so transformers runs them in this process, and an OpenAI-compatible endpoint serves them
as well. The questions are the published ones. The answer has a number for each of the three:

    Alignment Score (1-5): 2.6947

The published code stops at the text of the answer. The reward is the mean of the three, each divided by 5,
with weights if wanted. An answer without the three numbers is asked for again, and is never a score
(``vlm_answers``).

``PairwiseUnified`` asks the published question about two images, in both orders. The shares of the first
image (those of both add up to 1) are averaged over the three and over both orders.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.place import Place
from diffalign.rewards.registry import REGISTRY
from diffalign.rewards.sources import number, places_and_options
from diffalign.rewards.zoo.instructions import refuse_unreadable, template
from diffalign.rewards.zoo.vlm_answers import Answerer, Asked, Unread, open_answerer
from diffalign.utils.http import UnusableError

_NAME = "unified_reward_2"
AXES = ("alignment", "coherence", "style")
_NUMBER = r"(\d+(?:\.\d+)?)"
_RESERVED = ("<image>", "<|")  # beginnings of vision-language models' special tokens
_TOKENS = 256  # of an answer; the published ones are some sixty
_HERE = Place()


def _equal() -> dict[str, float]:
    return dict.fromkeys(AXES, 1.0)


@dataclass(frozen=True)
class UnifiedReward2:
    """The reward of single images.

    Attributes:
        answerer: the model.
        weights: weights of the three points.
        batch_size: images at a time.
    """

    answerer: Answerer
    weights: Mapping[str, float] = field(default_factory=_equal)
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) from 0.2 to 1, float32.

        Raises:
            UserError: no usable answer, an empty prompt, or a prompt with a special token.
        """
        refuse_unreadable(_NAME, prompts, _RESERVED)
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        question = template(_NAME)
        asked = [
            Asked((image,), question.format(text_prompt=prompt), prompt)
            for image, prompt in zip(to_pil(images), prompts, strict=True)
        ]
        found = self.answerer.ask(asked, points)
        return torch.tensor([_mean(points, self.weights) / 5 for points in found])


@dataclass(frozen=True)
class PairwiseUnified:
    """The reward of pairs.

    Attributes:
        answerer: the model.
        weights: weights of the three shares.
    """

    answerer: Answerer
    weights: Mapping[str, float] = field(default_factory=_equal)

    def compare(self, first: Images, second: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return the share of the first image, (B,) float32 in [0, 1]: the mean of both orders.

        Raises:
            ValueError: not as many images as prompts.
            UserError: as ``UnifiedReward2``.
        """
        a, b = to_pil(first), to_pil(second)
        if not len(a) == len(b) == len(prompts):
            raise ValueError(f"{len(a)} and {len(b)} images for {len(prompts)} prompts")
        refuse_unreadable(_NAME, prompts, _RESERVED)
        question = template(f"{_NAME}_pair")
        asked = [
            Asked(both, question.format(text_prompt=prompt), prompt)
            for pairs in (zip(a, b, strict=True), zip(b, a, strict=True))
            for both, prompt in zip(pairs, prompts, strict=True)
        ]
        found = self.answerer.ask(asked, shares)
        forward, swapped = torch.tensor([_mean(share, self.weights) for share in found]).reshape(2, -1)
        share: Tensor = (forward + 1 - swapped) / 2
        return share


def points(answer: str) -> dict[str, float]:
    """Return the three points of an answer, each from 1 to 5.

    Raises:
        UnusableError: one is missing or outside the range.
    """
    found = {}
    for axis in AXES:
        match = re.search(rf"(?i){axis} score \(1-5\):\s*{_NUMBER}", answer)
        if match is None:
            raise UnusableError(f"an answer without '{axis.capitalize()} Score (1-5):' and a number")
        found[axis] = float(match[1])
        if not 1 <= found[axis] <= 5:
            raise UnusableError(f"{axis} is {match[1]}, outside 1 to 5")
    return found


def shares(answer: str) -> dict[str, float]:
    """Return the first image's share of each of the three, from 0 to 1.

    Raises:
        UnusableError: a number is missing, or the two of the images do not add up to 1 within 0.05.
    """
    found = {}
    for axis in AXES:
        both = rf"(?i){axis} score:\s*image 1:\s*{_NUMBER}\s*image 2:\s*{_NUMBER}"
        match = re.search(both, answer)
        if match is None:
            raise UnusableError(f"an answer without '{axis.capitalize()} Score:' of both images")
        total = float(match[1]) + float(match[2])
        if abs(total - 1) > 0.05:
            raise UnusableError(f"{axis} is {match[1]} and {match[2]}, which do not add up to 1")
        found[axis] = float(match[1]) / total
    return found


def _mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return sum(weights[axis] * values[axis] for axis in AXES) / sum(weights.values())


def _opened(source: str | None, place: Place) -> tuple[Answerer, dict[str, float]]:
    """Return the model and the weights of a source; see ``load``."""
    (where, model), options = places_and_options(_NAME, source, 2, AXES)
    weights = {axis: number(_NAME, axis, options.get(axis, "1")) for axis in AXES}
    if min(weights.values()) < 0 or not any(weights.values()):
        text = ", ".join(f"{axis}={weight:g}" for axis, weight in weights.items())
        raise UserError(f"reward {_NAME!r}: {text}; allowed: 0 or more, and not all 0")
    where = where or REGISTRY[_NAME].checkpoint
    return open_answerer(Unread(_NAME), where, model, _TOKENS, place), weights


def load(source: str | None, place: Place) -> UnifiedReward2:
    """Return the reward of a folder or hub id, or of ADDRESS@MODEL; this sends no request.

    Weights of the points follow as options: ``@alignment=2@style=0``.

    Raises:
        UserError: an invalid address, no model, a model that cannot be loaded, or a negative weight.
    """
    return UnifiedReward2(*_opened(source, place), place.batch_size)


def load_pairwise(source: str | None, place: Place = _HERE) -> PairwiseUnified:
    """Return the reward of pairs; takes and raises what ``load`` does."""
    return PairwiseUnified(*_opened(source, place))
