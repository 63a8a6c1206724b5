"""Whether an image shows the text that its prompt quotes, as Flow-GRPO scores it (arXiv 2505.05470).

The text is what stands between the first pair of straight double quotes: ``a sign that says "Open"``. Both
it and what is read are compared without spaces and in lower case. The reward is 1 - distance / length: the
distance is 0 where the text occurs in what is read, else Levenshtein's, at most the text's length. So it is
1 for the whole text and 0 for none of it.

Read by RapidOCR (PaddleOCR's networks on ONNX runtime, on the CPU; the weights come with its wheel): scores
are near those of PaddleOCR itself, which Flow-GRPO used, but not the same.
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
    """Reads."""

    def __call__(self, image: Image.Image) -> Sequence[str]:
        """Return the lines of text in an RGB image, from the top."""
        ...


def quoted(prompt: str) -> str:
    """Return the text in the first pair of straight double quotes, without spaces, in lower case.

    Raises:
        UserError: there is no such pair, or nothing in it.
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
    """1 if ``text`` (as ``quoted`` gives it) is in the joined lines, down to 0 for nothing alike."""
    read = _bare("".join(lines))
    if text in read:
        return 1.0
    return 1 - min(levenshtein(text, read), len(text)) / len(text)


def levenshtein(one: str, other: str) -> int:
    """How many characters must be put in, taken out or changed to make one text the other."""
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
    """How much of the quoted text a recogniser reads."""

    recogniser: Recogniser
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 in [0, 1]; pixels (B, 3, H, W) are rounded to 8 bits. UserError as ``quoted`` says."""
        for prompt in prompts:  # before anything is read
            quoted(prompt)
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Tensor:
        pairs = zip(to_pil(images), prompts, strict=True)
        return torch.tensor([agreement(quoted(prompt), self.recogniser(image)) for image, prompt in pairs])


@dataclass(frozen=True)
class Rapid:
    """RapidOCR: lines that it is at least half sure of."""

    engine: Any

    def __call__(self, image: Image.Image) -> Sequence[str]:
        """Return the lines, from the top and from the left."""
        bgr = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])  # as OpenCV has them
        return self.engine(bgr).txts or ()


def load(source: str | None, place: Place) -> Ocr:
    """Return the reward with RapidOCR, on the CPU with torch's number of threads; UserError if it is not
    there.
    """
    no_source("ocr", source)
    try:
        import onnxruntime  # noqa: F401  (RapidOCR asks for it too late, and in its own words)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"reward 'ocr' needs {error.name}, which is not here: pip install \"{REGISTRY['ocr'].needs}\""
        ) from error
    threads = torch.get_num_threads()
    settings = {"Global.log_level": "error", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
    return Ocr(Rapid(RapidOCR(params=settings)), place.batch_size)
