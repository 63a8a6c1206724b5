"""The client of a remote reward, such as ``http://host:8765/judge``.

The server is ``diffalign serve-rewards`` or any other that implements this protocol:

    POST <address>    {"images": [base64 of a PNG, ...], "prompts": [text, ...]}
    response          {"scores": [number, ...]}: one finite number an image; else {"error": text}

A request about clean estimates made at noisy times also has "t": [time in [0, 1], ...]; a reward that is
no ``TimedReward`` ignores it. One about prompts with a source image (edits) has "sources": [base64 of a PNG,
...], one for each prompt; a reward that judges no edits ignores them. Nothing is unpickled. Images are sent
as 8-bit RGB PNGs; a tensor of pixels is rounded as ``images.to_pil`` does, so its score is that of the saved
image.
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
from diffalign.media.sourced import sources_of
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place
from diffalign.utils.http import JsonClient, NoAnswerError, Patience, UnusableError

_LONGEST = 10.0  # seconds between two tries, at most
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RemoteReward:
    """A ``TimedReward`` whose scores a server computes.

    Attributes:
        url: address of the reward.
        batch_size: images a request.
        timeout: seconds to wait for a response.
        retries: further tries after a transient failure.
        pause: seconds before the second try; each further wait is twice as long.
    """

    url: str
    batch_size: int = 16
    timeout: float = 600.0
    retries: int = 3
    pause: float = 0.5

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32.

        Raises:
            UserError: no try returned scores; it names the address and the prompts.
        """
        return in_batches(self._scores, images, prompts, self.batch_size)

    def at(self, images: Images, prompts: Sequence[str], t: Tensor) -> Tensor:
        """Return scores (B,), float32, of clean estimates made at times ``t`` (B,) in [0, 1]."""
        size = self.batch_size
        starts = range(0, len(prompts), size)
        parts = [
            self._scores(images[i : i + size], list(prompts[i : i + size]), t[i : i + size]) for i in starts
        ]
        return torch.cat(parts) if parts else torch.zeros(0)

    def _scores(self, images: Images, prompts: list[str], t: Tensor | None = None) -> Tensor:
        payload: dict[str, Any] = {"images": [_encoded(i) for i in to_pil(images)], "prompts": prompts}
        if sourced := sources_of(prompts):
            payload["sources"] = [_encoded(prompt.image) for prompt in sourced]
        if t is not None:
            payload["t"] = t.tolist()
        return torch.tensor(self._post(payload, prompts), dtype=torch.float32)

    def _post(self, payload: dict[str, Any], prompts: list[str]) -> list[float]:
        client = JsonClient(self.url, "scores", Patience(self.timeout, self.retries, self.pause, _LONGEST))
        try:
            return client.post(payload, lambda response: _finite(response["scores"], prompts))
        except NoAnswerError as error:
            tries = f"{error.tries} {'try' if error.tries == 1 else 'tries'}"
            raise UserError(
                f"reward {self.url}: no scores for {shortened(prompts)} ({tries}): {error.problem}"
            ) from error


def load(source: str | None, place: Place) -> RemoteReward:
    """Return the reward at an address; this sends no request."""
    assert source is not None  # registry.parse gives one
    return RemoteReward(source, place.batch_size)


def shortened(prompts: Sequence[str]) -> str:
    """Return distinct prompts for a message, at most three of them, and the number of others."""
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
