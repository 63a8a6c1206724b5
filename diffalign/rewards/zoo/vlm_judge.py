"""A vision-language model as a judge with a custom question: ``vlm_judge:FILE.yaml``.

    path: Qwen/Qwen2.5-VL-7B-Instruct
    prompt: "Does the image show '{prompt}'? Think, then end with a number from 1 to 10."
    low: 1
    high: 10

``path`` is a folder or hub id of a model that transformers runs in this process, with at most ``tokens`` new
tokens for an answer. ``url: http://localhost:8000/v1`` and ``model`` name an OpenAI-compatible endpoint
instead. The score is the last number of the answer, scaled from [``low``, ``high``] to [0, 1].

A rubric has two forms. With one question and ``criteria: {composition: 0.5, fit: 1}`` the answer must have a
line such as ``composition: 7`` for each criterion. With several questions, ``prompt: {composition: "...",
fit: "..."}``, each is asked separately. The score is the mean, weighted by ``criteria``. An unusable answer
is counted, the question is asked again, and then it is an error; it never becomes a score (``vlm_answers``).

``PairwiseJudge`` compares two images of a prompt in both orders, since such models are biased towards a
position, and returns the mean of both. Its question calls the images ``A`` and ``B``, and the last line of
the answer must be ``A``, ``B`` or ``tie``.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
from diffalign.rewards.place import Place
from diffalign.rewards.zoo.vlm_answers import Answerer, Asked, Remote, Unread, load_local
from diffalign.utils.chat_completions import Endpoint, check_endpoint
from diffalign.utils.http import UnusableError

_NAME = "vlm_judge"
_FIELDS = ("path", "url", "model", "prompt", "low", "high", "criteria", "side", "tokens")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w%])")
_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}
_HERE = Place()
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """The settings of a file: the model, the questions, and the range of answers.

    Attributes:
        name: name of the file, for messages.
        answerer: the model.
        prompts: the questions by criterion; a single question has the name "". ``{prompt}`` stands for the
            image's prompt.
        low: lowest number of points in an answer.
        high: highest number of points in an answer.
        criteria: weights by criterion; empty: equal weights.
        side: longest side of an image that the model gets, in pixels.
    """

    name: str
    answerer: Answerer
    prompts: Mapping[str, str]
    low: float = 1.0
    high: float = 10.0
    criteria: Mapping[str, float] = field(default_factory=dict)
    side: int = 768

    def ask(
        self, shown: Sequence[tuple[Sequence[Image.Image], str]], read: Callable[[str], T]
    ) -> list[list[T]]:
        """Ask every question about each (images, prompt), and return ``read`` of the answers.

        Raises:
            UserError: a question got no usable answer.
        """
        asked = [
            Asked(
                tuple(within(image, self.side) for image in images), text.replace("{prompt}", prompt), prompt
            )
            for images, prompt in shown
            for text in self.prompts.values()
        ]
        answers, count = self.answerer.ask(asked, read), len(self.prompts)
        return [answers[i : i + count] for i in range(0, len(answers), count)]


@dataclass(frozen=True)
class VLMJudge:
    """The reward: points or a rubric's mean, in [0, 1]; ``batch_size`` images at a time."""

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
        several = len(question.prompts) > 1
        lines = {} if several else question.criteria
        weights = [question.criteria.get(name, 1.0) if several else 1.0 for name in question.prompts]
        shown = [([image], prompt) for image, prompt in zip(to_pil(images), prompts, strict=True)]
        found = question.ask(shown, lambda answer: points(answer, question.low, question.high, lines))
        return torch.tensor(found) @ torch.tensor(weights) / sum(weights)


@dataclass(frozen=True)
class PairwiseJudge:
    """A judge of pairs that asks in both orders."""

    question: Question

    def compare(self, first: Images, second: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return the mean verdict of both orders, (B,) float32 in [0, 1].

        It is 1 if the first image wins in both orders, 0 if the second does, and 0.5 if they contradict each
        other.

        Raises:
            ValueError: not as many images as prompts.
            UserError: no usable answer.
        """
        a, b = to_pil(first), to_pil(second)
        if not len(a) == len(b) == len(prompts):
            raise ValueError(f"{len(a)} and {len(b)} images for {len(prompts)} prompts")
        forward = [([x, y], p) for x, y, p in zip(a, b, prompts, strict=True)]
        swapped = [([y, x], p) for x, y, p in zip(a, b, prompts, strict=True)]
        verdicts = torch.tensor(self.question.ask(forward + swapped, winner)).reshape(2, -1)
        return (verdicts[0] + 1 - verdicts[1]) / 2


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


def read_question(source: str | None, place: Place = _HERE) -> Question:
    """Read the settings of a file, and load the model of ``path`` if it has one.

    Raises:
        UserError: no file, a field that is missing, unknown or of another kind, or a model that cannot be
            loaded.
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
    prompts = _prompts(file, data.get("prompt"))
    low, high = (_number(file, name, data.get(name, usual)) for name, usual in (("low", 1), ("high", 10)))
    if low >= high:
        raise UserError(f"{file}: low is {low:g} and high {high:g}; allowed: low below high")
    criteria, side = _criteria(file, data.get("criteria")), _count(file, "side", data.get("side", 768))
    if len(prompts) > 1 and criteria and criteria.keys() != prompts.keys():
        raise UserError(
            f"{file}: criteria has weights for {', '.join(criteria)}; allowed: for the questions "
            f"{', '.join(prompts)}"
        )
    return Question(file.stem, _answerer(file, data, place), prompts, low, high, criteria, side)


def _answerer(file: Path, data: Mapping[str, Any], place: Place) -> Answerer:
    """Return the model of ``path``, or the one at ``url``."""
    unread = Unread(file.stem)
    if "path" in data:
        for name in ("url", "model"):
            if name in data:
                raise UserError(f"{file}: both path and {name}; allowed: path, or url and model")
        return load_local(
            unread, _text(file, "path", data), _count(file, "tokens", data.get("tokens", 512)), place
        )
    if "tokens" in data:
        raise UserError(f"{file}: tokens with url, whose endpoint decides; allowed with path")
    url, model = _text(file, "url", data), _text(file, "model", data)
    check_endpoint(url, model, f"{file}: ", _NAME)
    return Remote(Endpoint(url, model, temperature=0.0), unread, place.batch_size)


def _text(file: Path, name: str, data: Mapping[str, Any]) -> str:
    value = data.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{file}: {name} is {value!r}; needed: a text (path, or url and model)")
    return value


def _prompts(file: Path, value: Any) -> dict[str, str]:
    if isinstance(value, str):
        return {"": value}
    if isinstance(value, Mapping) and value and all(isinstance(text, str) for text in value.values()):
        return {str(name): text for name, text in value.items()}
    raise UserError(f"{file}: prompt is {repr(value)[:60]}; needed: a text, or texts by name")


def _criteria(file: Path, value: Any) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{file}: criteria is {str(value)[:60]!r}; allowed: weights by name")
    weights = {str(name): _number(file, f"criteria.{name}", weight) for name, weight in value.items()}
    for name, weight in weights.items():
        if weight <= 0:
            raise UserError(f"{file}: criteria.{name} is {weight:g}; allowed: above 0")
    return weights


def _count(file: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {name} is {value!r}; allowed: 1 or more")
    return value


def _number(file: Path, name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < float("inf"):
        raise UserError(f"{file}: {name} is {value!r}; allowed: a finite number")
    return float(value)


def load(source: str | None, place: Place) -> VLMJudge:
    """Return the judge of a file; this sends no request. Raises as ``read_question`` does."""
    return VLMJudge(read_question(source, place), place.batch_size)


def load_pairwise(source: str, place: Place = _HERE) -> PairwiseJudge:
    """Return the pairwise judge of a file.

    Raises:
        UserError: as ``read_question``, or the file has several questions.
    """
    question = read_question(source, place)
    if len(question.prompts) > 1:
        raise UserError(f"{source}: {len(question.prompts)} questions; allowed to compare two images: one")
    return PairwiseJudge(question)
