"""Soft-TIFA, GenEval 2's scores (Kamath et al. 2025, arXiv 2512.16853): a vision-language model is asked.

A prompt comes with questions (``geneval2_questions``). The score of a question is the probability of the
right answer in the model's distribution over the first token of its answer, summed over the spellings of the
answer: "Yes" and "yes", or the number as a word and as digits, each also after a space. The published code
takes the first token of every spelling; here a spelling counts if it is one token, and once. For the
published judge's tokenizer (Qwen3-VL) that leaves out the bare space before digits, which every number
shares, and changes nothing else. Two means over the Q questions of a prompt, p_q the scores:

    AM = (p_1 + ... + p_Q) / Q              atoms      (``geneval2_am``)
    GM = (p_1 * ... * p_Q) ** (1 / Q)       prompts    (``geneval2_gm``)

The benchmark's figure is 100 times the mean over its 800 prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images, in_batches, to_pil
from diffalign.rewards.place import Place
from diffalign.rewards.registry import REGISTRY
from diffalign.rewards.sources import places_and_options
from diffalign.rewards.zoo.geneval2_questions import Question, check_known, questions_of, read_questions
from diffalign.rewards.zoo.instructions import refuse_unreadable, reserved
from diffalign.rewards.zoo.vision_language import Reader, reader_of

_ASKED = "{} Answer in one word."  # the published wording


@dataclass(frozen=True)
class SoftTifa:
    """Soft-TIFA with any vision-language model.

    Attributes:
        reader: the vision-language model.
        questions: by prompt.
        place: where the questions are from, for messages.
        tokens: token ids of each spelling that is one token, by answer.
        mean: over the questions of a prompt.
        batch_size: questions a forward pass.
    """

    reader: Reader
    questions: Mapping[str, tuple[Question, ...]]
    place: str
    tokens: Mapping[str, tuple[int, ...]]
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    batch_size: int = 16

    def __call__(self, images: Images, prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return scores (B,) in [0, 1], float32; tensors (B, 3, H, W) take the differentiable path.

        Raises:
            UserError: prompts without questions, with their count.
        """
        self.check_prompts(prompts)
        return in_batches(self._score, images, prompts, self.batch_size)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a UserError for prompts without questions, with their count."""
        check_known(self.reader.name, self.questions, prompts, self.place)

    def by_skill(self, images: Images, prompts: Sequence[str]) -> dict[str, float]:
        """Return the mean score of the questions of each skill, over all questions of all B images.

        This is the benchmark's analysis by skill. A question whose skill the file leaves out is under "".

        Raises:
            UserError: prompts without questions, with their count.
        """
        found: dict[str, list[float]] = {}
        for logs, prompt in zip(self.log_probabilities(images, prompts), prompts, strict=True):
            asked = questions_of(self.questions, prompt)
            for score, question in zip(logs.exp().tolist(), asked, strict=True):
                found.setdefault(question.skill, []).append(score)
        return {skill: sum(scores) / len(scores) for skill, scores in found.items()}

    def log_probabilities(self, images: Images, prompts: Sequence[str]) -> list[Tensor]:
        """Return log p of the right answers, for each of B images a tensor (Q,) over its prompt's questions.

        Raises:
            UserError: prompts without questions, with their count.
        """
        self.check_prompts(prompts)
        asked = [questions_of(self.questions, prompt) for prompt in prompts]
        flat = [(i, question) for i, questions in enumerate(asked) for question in questions]
        refuse_unreadable(
            self.reader.name, [q.text for _, q in flat], reserved(self.reader.processor.tokenizer)
        )
        if not flat:
            return []
        pictures = images if isinstance(images, Tensor) else to_pil(images)
        steps = range(0, len(flat), self.batch_size)
        logs = torch.cat([self._logs(pictures, flat[at : at + self.batch_size]) for at in steps])
        return list(logs.split([len(questions) for questions in asked]))

    def _score(self, images: Images, prompts: list[str]) -> Float[Tensor, " B"]:
        logs = self.log_probabilities(images, prompts)
        if self.mean == "geometric":
            return torch.stack([one.mean().exp() for one in logs])
        return torch.stack([one.exp().mean() for one in logs])

    def _logs(self, images: Images, asked: Sequence[tuple[int, Question]]) -> Float[Tensor, " Q"]:
        """Return log p of the right answers to questions about the images of those indices."""
        texts = [self.reader.asked(_ASKED.format(question.text)) for _, question in asked]
        which = [i for i, _ in asked]
        chosen = images[which] if isinstance(images, Tensor) else [images[i] for i in which]
        first = self.reader.next_token(chosen, texts).log_softmax(-1)
        tokens = [list(self.tokens[question.answer]) for _, question in asked]
        return torch.stack([row[ids].logsumexp(0) for row, ids in zip(first, tokens, strict=True)])


def load_am(source: str | None, place: Place) -> SoftTifa:
    """Load Soft-TIFA AM; ``source`` is MODEL, questions=FILE, or MODEL@questions=FILE.

    The defaults are the card's model and the published questions, fetched as ``--prompts geneval2`` is.

    Raises:
        UserError: no such model, one that writes no answer as one token, or questions that cannot be read.
    """
    return _load("geneval2_am", source, place, "arithmetic")


def load_gm(source: str | None, place: Place) -> SoftTifa:
    """Load Soft-TIFA GM; ``source`` and errors as of ``load_am``."""
    return _load("geneval2_gm", source, place, "geometric")


def _load(name: str, source: str | None, place: Place, mean: Literal["arithmetic", "geometric"]) -> SoftTifa:
    (model,), options = places_and_options(name, source, 1, ["questions"])
    questions, where = read_questions(name, options.get("questions", ""))
    reader = reader_of(name, model or REGISTRY[name].checkpoint, place)
    reader.any_question()
    answers = {question.answer: question for asked in questions.values() for question in asked}
    tokens = {answer: one_token(reader, question) for answer, question in answers.items()}
    return SoftTifa(reader, questions, where, tokens, mean, place.batch_size)


def one_token(reader: Reader, question: Question) -> tuple[int, ...]:
    """Return the distinct tokens that each write a complete spelling of a question's answer.

    Raises:
        UserError: there is none.
    """
    tokenizer = reader.processor.tokenizer
    written = [tokenizer(text, add_special_tokens=False).input_ids for text in question.spellings]
    tokens = tuple(dict.fromkeys(ids[0] for ids in written if len(ids) == 1))
    if not tokens:
        raise UserError(
            f"reward {reader.name!r}: the tokenizer of {reader.source!r} writes none of "
            f"{', '.join(map(repr, question.spellings))} as one token, so the probability of the answer "
            "cannot be read; take another model"
        )
    return tokens
