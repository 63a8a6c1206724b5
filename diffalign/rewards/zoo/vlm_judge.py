"""A vision-language model at an OpenAI-compatible endpoint with a custom question: ``vlm_judge:FILE.yaml``.

    url: http://localhost:8000/v1
    model: Qwen/Qwen2.5-VL-7B-Instruct
    prompt: "Does the image show '{prompt}'? Think, then end with a number from 1 to 10."
    low: 1
    high: 10

The score is the last number of the answer, scaled from [``low``, ``high``] to [0, 1]. With
``criteria: {composition: 0.5, prompt: 1}`` (a rubric) the answer must have a line such as ``composition: 7``
for each criterion, and the score is their weighted mean. A request without a usable answer is retried, and
then is an error; it never becomes a score.

``PairwiseJudge`` compares two images of a prompt in both orders, since such models are biased towards a
position; if the two orders disagree, the pair is a tie. Its question calls the images ``A`` and ``B``, and
the last line of the answer must be ``A``, ``B`` or ``tie``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffalign.config.files import read_yaml
from diffalign.errors import UserError, unknown
from diffalign.media.images import within
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.unified_reward import data_url
from diffalign.utils.chat_completions import Endpoint, check_endpoint
from diffalign.utils.http import NoAnswerError, UnusableError

_NAME = "vlm_judge"
_FIELDS = ("url", "model", "prompt", "low", "high", "criteria", "side")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w%])")
_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """The settings of a file: the endpoint, the question, and the range of answers.

    Attributes:
        name: name of the file, for messages.
        endpoint: the model at its address.
        prompt: the question; ``{prompt}`` stands for the image's prompt.
        low: lowest number of points in an answer.
        high: highest number of points in an answer.
        criteria: weights of a rubric's criteria, by name; None or empty: the answer has one number.
        side: longest side of a sent image, in pixels.
    """

    name: str
    endpoint: Endpoint
    prompt: str
    low: float = 1.0
    high: float = 10.0
    criteria: Mapping[str, float] | None = None
    side: int = 768

    def ask(self, images: Sequence[Image.Image], prompt: str, read: Callable[[str], T]) -> T:
        """Ask the question about these images and return ``read`` of the answer.

        Raises:
            UserError: no try gave a usable answer.
        """
        content = [
            {"type": "image_url", "image_url": {"url": data_url(within(image, self.side))}}
            for image in images
        ]
        text = self.prompt.replace("{prompt}", prompt)
        try:
            return self.endpoint.complete([*content, {"type": "text", "text": text}], read)[0]
        except NoAnswerError as error:
            raise UserError(
                f"reward {self.name!r}: no answer from {self.endpoint.url} (model {self.endpoint.model!r}, "
                f"{error.tries} tries) for {prompt!r}: {error.problem}"
            ) from error


@dataclass(frozen=True)
class VLMJudge:
    """The reward: points or a rubric's mean, in [0, 1]; ``batch_size`` requests run concurrently."""

    question: Question
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) in [0, 1], float32.

        Raises:
            UserError: an image got no usable answer; it names the prompt.
        """
        return in_batches(self._score, images, prompts, self.batch_size)

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        question = self.question
        read = lambda answer: points(answer, question.low, question.high, question.criteria or {})  # noqa: E731
        with ThreadPoolExecutor(self.batch_size) as pool:
            score = lambda image, prompt: question.ask([image], prompt, read)  # noqa: E731
            return torch.tensor(list(pool.map(score, to_pil(images), prompts)))


@dataclass(frozen=True)
class PairwiseJudge:
    """A judge of pairs that asks in both orders; ``batch_size`` requests run concurrently."""

    question: Question
    batch_size: int = 16

    def compare(self, first: Images, second: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return (B,) float32: 1 if the first image wins in both orders, 0 if the second does, else 0.5.

        Raises:
            ValueError: not as many images as prompts.
            UserError: no usable answer.
        """
        a, b = to_pil(first), to_pil(second)
        if not len(a) == len(b) == len(prompts):
            raise ValueError(f"{len(a)} and {len(b)} images for {len(prompts)} prompts")
        questions = [([x, y], p) for x, y, p in zip(a, b, prompts, strict=True)]
        questions += [([y, x], p) for x, y, p in zip(a, b, prompts, strict=True)]
        with ThreadPoolExecutor(self.batch_size) as pool:
            answers = list(pool.map(lambda pair: self.question.ask(pair[0], pair[1], winner), questions))
        forward, swapped = torch.tensor(answers).reshape(2, -1)
        return torch.where(forward + swapped == 1, forward, torch.full_like(forward, 0.5))


def points(answer: str, low: float, high: float, criteria: Mapping[str, float]) -> float:
    """Return an answer's points scaled to [0, 1]; with ``criteria``, their weighted mean.

    Raises:
        UnusableError: a number is missing, or outside [low, high].
    """
    if not criteria:
        numbers = _NUMBER.findall(answer)
        return _share(numbers[-1] if numbers else None, "a number", low, high)
    total = 0.0
    for name, weight in criteria.items():
        match = re.search(rf"(?im)^\W*{re.escape(name)}\W*[:=]\W*?(-?\d+(?:\.\d+)?)", answer)
        total += weight * _share(match[1] if match else None, name, low, high)
    return total / sum(criteria.values())


def _share(text: str | None, what: str, low: float, high: float) -> float:
    if text is None:
        raise UnusableError(f"an answer without {what}")
    if not low <= float(text) <= high:
        raise UnusableError(f"{what} is {text}, outside {low:g} to {high:g}")
    return (float(text) - low) / (high - low)


def winner(answer: str) -> float:
    """Return the verdict of an answer's last line: 1 for A, 0 for B, 0.5 for a tie.

    Raises:
        UnusableError: the last line is none of them.
    """
    lines = [line for line in answer.lower().splitlines() if line.strip()]
    word = re.sub(r"^.*(?::|image|is)\s", "", lines[-1].strip()).strip(" .*`'\"") if lines else ""
    if word not in _VERDICTS:
        raise UnusableError(f"an answer whose last line is none of A, B, tie: {answer[-60:]!r}")
    return _VERDICTS[word]


def read_question(source: str | None) -> Question:
    """Read the settings of a file.

    Raises:
        UserError: no file, or a field that is missing, unknown or of another kind.
    """
    if source is None:
        raise UserError(f"reward {_NAME!r} needs a file; write {_NAME}:FILE.yaml")
    file = Path(source).expanduser()
    if not file.is_file():
        raise UserError(f"{_NAME} {source!r}: no such file")
    data = read_yaml(file)
    for name in data:
        if name not in _FIELDS:
            raise unknown(f"field of {file}", name, _FIELDS)
    for name in ("url", "model", "prompt"):
        if not isinstance(data.get(name), str):
            raise UserError(f"{file}: {name} is {data.get(name)!r}; needed: a text")
    check_endpoint(data["url"], data["model"], f"{file}: ", _NAME)
    low, high = (_number(file, name, data.get(name, usual)) for name, usual in (("low", 1), ("high", 10)))
    if low >= high:
        raise UserError(f"{file}: low is {low:g} and high {high:g}; allowed: low below high")
    side = data.get("side", 768)
    if not isinstance(side, int) or isinstance(side, bool) or side < 1:
        raise UserError(f"{file}: side is {side!r}; allowed: pixels, 1 or more")
    endpoint = Endpoint(data["url"], data["model"], temperature=0.0)
    return Question(
        file.stem, endpoint, data["prompt"], low, high, _criteria(file, data.get("criteria")), side
    )


def _criteria(file: Path, value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{file}: criteria is {str(value)[:60]!r}; allowed: weights by name")
    weights = {str(name): _number(file, f"criteria.{name}", weight) for name, weight in value.items()}
    for name, weight in weights.items():
        if weight <= 0:
            raise UserError(f"{file}: criteria.{name} is {weight:g}; allowed: above 0")
    return weights


def _number(file: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise UserError(f"{file}: {name} is {value!r}; allowed: a finite number")
    return float(value)


def load(source: str | None, place: Place) -> VLMJudge:
    """Return the judge of a file; this sends no request. Raises as ``read_question`` does."""
    return VLMJudge(read_question(source), place.batch_size)


def load_pairwise(source: str, batch_size: int = 16) -> PairwiseJudge:
    """Return the pairwise judge of a file; this sends no request. Raises as ``read_question`` does."""
    return PairwiseJudge(read_question(source), batch_size)
