"""OCR reward: how much of the text that the prompt quotes is legible in the image (Flow-GRPO, 2505.05470).

The target text stands between the first pair of straight double quotes: ``a sign that says "Open"``. Target
and recognised text are compared in lower case without spaces. The reward is 1 - distance / length, where the
distance is 0 if the recognised text contains the target, else their Levenshtein distance, at most the length.
So the reward is 1 for the complete text and 0 for none of it.

RapidOCR recognises the text (PaddleOCR's networks on ONNX runtime, on the CPU; its wheel has the weights).
Scores are close to those of PaddleOCR itself, which Flow-GRPO used, but not equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import REGISTRY, Place, no_source


@runtime_checkable
class Recogniser(Protocol):
    """Recognises text in images."""

    def __call__(self, image: Image.Image) -> Sequence[str]:
        """Return the lines of text in an RGB image, from the top."""
        ...


def quoted(prompt: str) -> str:
    """Return the text in the prompt's first pair of straight double quotes, in lower case without spaces.

    Raises:
        UserError: there is no such pair, or it is empty.
    """
    parts = prompt.split('"', 2)
    if len(parts) < 3:
        raise UserError(
            f"reward 'ocr': no text between straight double quotes in the prompt {prompt!r}; write what the "
            'image must say as "this"'
        )
    text = _bare(parts[1])
    if not text:
        raise UserError(f"reward 'ocr': nothing between the first quotes of the prompt {prompt!r}")
    return text


def agreement(text: str, lines: Sequence[str]) -> float:
    """Return the agreement of a target text (from ``quoted``) with recognised lines, in [0, 1].

    It is 1 if the joined lines contain the text.
    """
    recognised = _bare("".join(lines))
    if text in recognised:
        return 1.0
    return 1 - min(levenshtein(text, recognised), len(text)) / len(text)


def levenshtein(one: str, other: str) -> int:
    """Return the Levenshtein distance: insertions, deletions and substitutions of characters."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _bare(text: str) -> str:
    return "".join(text.split()).lower()


@dataclass(frozen=True)
class Ocr:
    """The reward with any recogniser."""

    recogniser: Recogniser
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) in [0, 1], float32; pixels (B, 3, H, W) are rounded to 8 bits.

        Raises:
            UserError: a prompt quotes no text.
        """
        self.check_prompts(prompts)  # fail before the recogniser runs
        return in_batches(self._score, images, prompts, self.batch_size)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for a prompt that quotes no text."""
        for prompt in prompts:
            quoted(prompt)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        pairs = zip(to_pil(images), prompts, strict=True)
        return torch.tensor([agreement(quoted(prompt), self.recogniser(image)) for image, prompt in pairs])


@dataclass(frozen=True)
class Rapid:
    """RapidOCR; it returns lines with a confidence of at least 1/2."""

    engine: Any

    def __call__(self, image: Image.Image) -> Sequence[str]:
        """Return the lines, from top to bottom and left to right."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # OpenCV's order of channels
        return self.engine(bgr).txts or ()


def load(source: str | None, place: Place) -> Ocr:
    """Load the reward with RapidOCR, on the CPU with torch's number of threads.

    Raises:
        UserError: RapidOCR or ONNX runtime is not installed, or a source is given.
    """
    no_source("ocr", source)
    try:
        import onnxruntime  # noqa: F401  (RapidOCR imports it later, with another error message)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"reward 'ocr' needs {error.name}, which is not here: pip install \"{REGISTRY['ocr'].needs}\""
        ) from error
    threads = torch.get_num_threads()
    settings = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
    return Ocr(Rapid(RapidOCR(params=settings)), place.batch_size)
