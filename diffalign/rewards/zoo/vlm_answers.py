"""Vision-language models that answer a judge's questions: at an endpoint (``Remote``) or local (``Local``).

An answer that cannot be parsed never becomes a score: the question is asked again, and then it is an error.
``Unread`` counts such answers and logs the first, the tenth, the hundredth one, and so on. An endpoint gets
the same question again. A local model decodes greedily, so its second question also states the problem of
the first answer.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards.place import Place
from diffalign.rewards.zoo.instructions import reserved
from diffalign.rewards.zoo.unified_reward import data_url
from diffalign.rewards.zoo.vision_language import adds_special_tokens, model_of, processor_of
from diffalign.utils.chat_completions import Endpoint, check_endpoint
from diffalign.utils.http import NoAnswerError, UnusableError

logger = logging.getLogger(__name__)
T = TypeVar("T")

TRIES = 3  # of a model in this process


class Asked(NamedTuple):
    """A question: images, its text, and the prompt that it is about, for messages."""

    images: tuple[Image.Image, ...]
    text: str
    prompt: str


@dataclass
class Unread:
    """The number of answers of a judge, and of those that could not be parsed; thread-safe.

    Attributes:
        name: name of the judge, for messages.
        answers: all answers so far.
        unread: answers that could not be parsed.
    """

    name: str
    answers: int = 0
    unread: int = 0
    lock: Any = field(default_factory=Lock, repr=False, compare=False)

    def counting(self, read: Callable[[str], T]) -> Callable[[str], T]:
        """Return ``read`` with a count of its answers."""

        def counted(answer: str) -> T:
            with self.lock:
                self.answers += 1
            try:
                return read(answer)
            except UnusableError as error:
                with self.lock:
                    self.unread += 1
                    self._tell(error, answer)
                raise

        return counted

    def _tell(self, error: UnusableError, answer: str) -> None:
        if self.unread == 10 ** (len(str(self.unread)) - 1):  # 1, 10, 100, ...
            logger.warning(
                "reward %r: %d of %d answers so far could not be read and were asked for again; the last: "
                "%s, in %r",
                self.name, self.unread, self.answers, error, answer[-60:],
            )  # fmt: skip


@runtime_checkable
class Answerer(Protocol):
    """Answers questions about images."""

    @property
    def unread(self) -> Unread:
        """Return the count of answers that could not be parsed."""
        ...

    def ask(self, asked: Sequence[Asked], read: Callable[[str], T]) -> list[T]:
        """Return ``read`` of each answer; ``read`` raises ``UnusableError`` for an unusable one.

        Raises:
            UserError: a question got no usable answer.
        """
        ...


@dataclass(frozen=True)
class Remote:
    """A model at an endpoint; ``at_once`` requests run concurrently."""

    endpoint: Endpoint
    unread: Unread
    at_once: int = 16

    def ask(self, asked: Sequence[Asked], read: Callable[[str], T]) -> list[T]:
        """Return ``read`` of each answer; see ``Answerer``."""
        reading = self.unread.counting(read)
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda one: self._one(one, reading), asked))

    def _one(self, asked: Asked, read: Callable[[str], T]) -> T:
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in asked.images]
        try:
            return self.endpoint.complete([*content, {"type": "text", "text": asked.text}], read)[0]
        except NoAnswerError as error:
            raise UserError(
                f"reward {self.unread.name!r}: no answer from {self.endpoint.url} (model "
                f"{self.endpoint.model!r}, {error.tries} tries) for {asked.prompt!r}: {error.problem}"
            ) from error


@dataclass(frozen=True)
class Local:
    """A model of transformers in this process, decoded greedily.

    Attributes:
        model: a model of AutoModelForImageTextToText.
        processor: the model's processor for PIL images; it pads on the left, so that every answer follows its
            question.
        source: folder or hub id, for messages.
        unread: the count of answers that could not be parsed.
        tokens: maximal number of new tokens of an answer.
        at_once: questions in one batch.
    """

    model: Any
    processor: Any
    source: str
    unread: Unread
    tokens: int = 512
    at_once: int = 16

    def ask(self, asked: Sequence[Asked], read: Callable[[str], T]) -> list[T]:
        """Return ``read`` of each answer; see ``Answerer``.

        Raises:
            UserError: also for a prompt that holds a token of the model's format.
        """
        self._check(asked)
        reading = self.unread.counting(read)
        found: dict[int, T] = {}
        problems = dict.fromkeys(range(len(asked)), "")
        for _ in range(TRIES):
            waiting = list(problems)
            for start in range(0, len(waiting), self.at_once):
                some = waiting[start : start + self.at_once]
                answers = self.answers([_again(asked[i], problems[i]) for i in some])
                for i, answer in zip(some, answers, strict=True):
                    try:
                        found[i] = reading(answer)
                    except UnusableError as error:
                        problems[i] = str(error)
                    else:
                        del problems[i]
        for i, problem in problems.items():
            raise UserError(
                f"reward {self.unread.name!r}: no usable answer from {self.source!r} ({TRIES} tries) for "
                f"{asked[i].prompt!r}: {problem}; {len(problems)} of {len(asked)} questions have none"
            )
        return [found[i] for i in range(len(asked))]

    @torch.no_grad()
    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """Return the answers of one batch of questions."""
        texts = [self._text(one) for one in asked]
        inputs = self.processor(
            text=texts,
            images=[list(one.images) for one in asked],
            padding=True,
            return_tensors="pt",
            add_special_tokens=adds_special_tokens(self.processor, texts[0]),
        ).to(self.model.device, self.model.dtype)
        written = self.model.generate(
            **inputs,
            max_new_tokens=self.tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        answers: list[str] = self.processor.batch_decode(
            written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        return answers

    def _text(self, asked: Asked) -> str:
        """Return a question in the model's chat template."""
        content = [{"type": "image"}] * len(asked.images) + [{"type": "text", "text": asked.text}]
        message = {"role": "user", "content": content}
        text: str = self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        return text

    def _check(self, asked: Sequence[Asked]) -> None:
        tokens = reserved(self.processor.tokenizer)
        for one in asked:
            token = next((token for token in tokens if token in one.prompt), None)
            if token is not None:
                raise UserError(
                    f"reward {self.unread.name!r}: the prompt {one.prompt!r} holds {token!r}, a token of the "
                    "model's own format; take it out"
                )


def _again(asked: Asked, problem: str) -> Asked:
    """Return a question with the problem of the previous answer."""
    if not problem:
        return asked
    return asked._replace(text=f"{asked.text}\n\nAn answer before could not be used: {problem}.")


def load_local(unread: Unread, source: str, tokens: int, place: Place) -> Local:
    """Return the model of a folder or hub id.

    Raises:
        UserError: no such model, no vision-language model, or one without a chat template.
    """
    processor = processor_of(unread.name, source, "left")
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"reward {unread.name!r}: {source!r} has no chat template, so it is not known how it is asked; "
            "allowed: a model that follows instructions"
        )
    model = model_of(unread.name, source, place)
    return Local(model, processor, source, unread, tokens, place.batch_size)


def open_answerer(unread: Unread, where: str, model: str, tokens: int, place: Place) -> Answerer:
    """Return the model of a folder or hub id, or ``model`` at the address ``where``; this sends no request.

    Raises:
        UserError: an invalid address, an address without a model, or as ``load_local``.
    """
    name = f"reward {unread.name!r}: "
    if where.startswith(("http://", "https://")):
        check_endpoint(where, model, name, unread.name)
        return Remote(Endpoint(where, model, temperature=0.0), unread, place.batch_size)
    if model:
        raise UserError(
            f"{name}{model!r} after the model {where!r}; allowed: http://HOST:PORT/v1@MODEL, or a folder or "
            "hub id alone"
        )
    return load_local(unread, where, tokens, place)
