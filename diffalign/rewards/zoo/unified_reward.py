"""UnifiedReward at an OpenAI-compatible endpoint, such as one of vLLM or SGLang.

Wang et al., "Unified Reward Model for Multimodal Understanding and Generation", arXiv 2503.05236. The
question, the image size (512 x 512), the temperature (0) and the parsing of answers are those of flow_grpo: a
score from 1 to 5 is divided by 5, and an answer without one counts 0. flow_grpo's question begins with
``<image>``, which LLaVA's template expects in the text. It is left out here, since chat endpoints place the
image themselves.
"""

import base64
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.instructions import refuse_unreadable, template
from diffalign.utils.chat_completions import Endpoint, check_endpoint
from diffalign.utils.http import NoAnswerError

_NAME = "unified_reward"
_SIDE = 512  # pixels
_SCORE = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
_RESERVED = ("<image>", "<|")  # beginnings of vision-language models' special tokens


@dataclass(frozen=True)
class UnifiedReward:
    """The reward at an endpoint; ``batch_size`` requests run concurrently."""

    endpoint: Endpoint
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,), float32: 0.2 to 1, or 0 where the answer has no score.

        Raises:
            UserError: no answer, an empty prompt, or a prompt with a special token.
        """
        refuse_unreadable(_NAME, prompts, _RESERVED)
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        with ThreadPoolExecutor(self.batch_size) as pool:
            return torch.tensor(list(pool.map(self._one, to_pil(images), prompts)))

    def _one(self, image: Image.Image, prompt: str) -> float:
        text = template(_NAME).format(text_prompt=prompt)
        picture = {"type": "image_url", "image_url": {"url": data_url(image.resize((_SIDE, _SIDE)))}}
        try:
            return self.endpoint.complete([picture, {"type": "text", "text": text}], points)[0]
        except NoAnswerError as error:
            raise UserError(
                f"reward {_NAME!r}: no answer from {self.endpoint.url} (model {self.endpoint.model!r}, "
                f"{error.tries} tries) for {prompt!r}: {error.problem}"
            ) from error


def points(answer: str) -> float:
    """Return the score in an answer, divided by 5; 0 if there is none."""
    match = _SCORE.search(answer)
    return float(match[1]) / 5 if match else 0.0


def data_url(image: Image.Image) -> str:
    """Return an image as a PNG in a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # four times as fast as the default, little larger
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def load(source: str | None, place: Place) -> UnifiedReward:
    """Return the reward of ADDRESS@MODEL (an address without /chat/completions); this sends no request.

    If the environment variable OPENAI_API_KEY is set, requests send it.

    Raises:
        UserError: no source, an invalid address, or no model.
    """
    url, at, model = (source or "").rpartition("@")
    if not at:
        raise UserError(
            f"reward {_NAME!r} is a model behind an address; write {_NAME}:http://HOST:PORT/v1@MODEL"
        )
    check_endpoint(url, model, f"reward {_NAME!r}: ", _NAME)
    return UnifiedReward(Endpoint(url, model, temperature=0.0), place.batch_size)
