"""A reward behind an address, ``http://host:8765/judge``: ``diffalign serve-rewards``, or whoever answers so.

    POST <address>    {"images": [base64 of a PNG, ...], "prompts": [text, ...]}
    answer            {"scores": [number, ...]}: one finite number an image; else {"error": text}

A question about clean estimates made at noisy times also has "t": [time in [0, 1], ...]; rewards that know no
time ignore it. Nothing is ever unpickled. The PNGs have 8 bits a channel: images are made RGB, and pixels
given as a tensor are rounded as ``images.to_pil`` does, so a score is that of the saved image.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place
from diffalign.utils.http import Asker, NoAnswerError, Patience, UnusableError

_LONGEST = 10.0  # seconds between two tries
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RemoteReward:
    """A ``TimedReward`` that asks a server.

    Attributes:
        url: where questions go.
        batch_size: images a question.
        timeout: seconds that an answer may take.
        retries: further tries after a failure that may pass.
        pause: seconds before the second try; each further wait is twice as long.
    """

    url: str
    batch_size: int = 16
    timeout: float = 600.0
    retries: int = 3
    pause: float = 0.5

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32; UserError naming url and prompt if no try gives scores."""
        return in_batches(self._scores, images, prompts, self.batch_size)

    def at(self, images: Images, prompts: Sequence[str], t: Tensor) -> Tensor:
        """(B,) float32 scores of clean estimates made at times ``t`` (B,) in [0, 1]; errors as above."""
        size = self.batch_size
        starts = range(0, len(prompts), size)
        parts = [
            self._scores(images[i : i + size], list(prompts[i : i + size]), t[i : i + size]) for i in starts
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _scores(self, images: Images, prompts: list[str], t: Tensor | None = None) -> Tensor:
        question: dict[str, Any] = {"images": [_encoded(i) for i in to_pil(images)], "prompts": prompts}
        if t is not None:
            question["t"] = t.tolist()
        return torch.tensor(self._ask(question, prompts), dtype=torch.float32)

    def _ask(self, question: dict[str, Any], prompts: list[str]) -> list[float]:
        ask = Asker(self.url, "scores", Patience(self.timeout, self.retries, self.pause, _LONGEST))
        try:
            return ask(question, lambda answer: _finite(answer["scores"], prompts))
        except NoAnswerError as error:
            tries = f"{error.tries} {'try' if error.tries == 1 else 'tries'}"
            raise UserError(
                f"reward {self.url}: no scores for {shortened(prompts)} ({tries}): {error.problem}"
            ) from error


def load(source: str | None, place: Place) -> RemoteReward:
    """Return the reward behind an address; no request is made yet."""
    assert source is not None  # registry.parse gives one
    return RemoteReward(source, place.batch_size)


def shortened(prompts: Sequence[str]) -> str:
    """Prompts for a message, each once, at most three of them."""
    different = list(dict.fromkeys(prompts))
    rest = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return f"the prompt{'s' * (len(different) > 1)} {', '.join(map(repr, different[:3]))}{rest}"


def _encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # four times as fast as the default, little larger
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _finite(scores: Any, prompts: list[str]) -> list[float]:
    if not isinstance(scores, list) or not all(type(s) in (int, float) for s in scores):
        raise UnusableError("an answer whose scores are no list of numbers")
    if len(scores) != len(prompts):
        raise UnusableError(f"{len(scores)} scores for {len(prompts)} images")
    for score, prompt in zip(scores, prompts, strict=True):
        if not abs(score) <= _LARGEST:  # false of nan as well
            raise UnusableError(f"the score {score} for {prompt!r}")
    return [float(score) for score in scores]
