"""Questions of GenEval 2's prompts (arXiv 2512.16853): the column ``vqa_list`` of ``geneval2_data.jsonl``.

A row has the fields ``prompt``, ``vqa_list`` ([question, answer] each) and ``skills``, one a question, which
may be absent. A question that begins with "How many" has a number word for an answer, any other has "Yes".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.data.prompts.prompt_files import prompt_of
from diffalign.data.prompts.published_prompts import PUBLISHED
from diffalign.errors import UserError

NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10,
}  # fmt: skip
_COUNTS, _YES = "How many", "Yes"


@dataclass(frozen=True)
class Question:
    """A question about an image, and its right answer.

    Attributes:
        text: the question.
        answer: "Yes", or a number word of ``NUMBERS``.
        skill: count, object, attribute, position or verb; "" if unknown.
    """

    text: str
    answer: str
    skill: str = ""

    @property
    def spellings(self) -> tuple[str, ...]:
        """The spellings of the answer that count."""
        bare = [self.answer.lower(), self.answer.capitalize()]
        bare += [str(NUMBERS[self.answer])] if self.answer in NUMBERS else []
        return (*bare, *(f" {text}" for text in bare))


def read_questions(name: str, file: str) -> tuple[dict[str, tuple[Question, ...]], str]:
    """Return the questions by prompt, and the place that they are from.

    Args:
        name: the reward's, for messages.
        file: json or json lines in the published layout; "" is the published file itself, fetched and cached.

    Raises:
        UserError: no such file, it cannot be fetched, it holds no questions, or a row is malformed.
    """
    published = PUBLISHED["geneval2"]
    try:
        rows = list(published.copy(file) if file else published.fetched())
    except UserError as error:
        raise UserError(
            f"reward {name!r}, whose questions are read as {name}:questions=FILE: {error}"
        ) from error
    place = file or published.where
    found: dict[str, tuple[Question, ...]] = {}
    for where, fields in rows:
        prompt = prompt_of((where, fields))
        if not prompt or fields.get("vqa_list") is None:
            continue  # `check_known` tells the prompt when an image of it is to be scored
        asked = _asked(where, fields)
        if found.setdefault(prompt, asked) != asked:
            raise UserError(
                f"{where}: {prompt!r} has other questions in a row before; allowed: one list each"
            )
    if not found:
        raise UserError(
            f"reward {name!r}: {place} has {len(rows)} rows and no questions; needed in a row: "
            '{"prompt": ..., "vqa_list": [["How many cats are in the image?", "two"], ...]}'
        )
    return found, place


def questions_of(questions: Mapping[str, tuple[Question, ...]], prompt: str) -> tuple[Question, ...]:
    """Return the questions of a prompt; none if there are none."""
    return questions.get(str(prompt).strip(), ())  # str: a prompt with a source equals no plain one


def check_known(
    name: str, questions: Mapping[str, tuple[Question, ...]], prompts: Sequence[str], place: str
) -> None:
    """Raise a UserError for prompts without questions, with their count; ``name`` is the reward's."""
    different = list(dict.fromkeys(str(prompt) for prompt in prompts))
    without = [prompt for prompt in different if not questions_of(questions, prompt)]
    if without:
        raise UserError(
            f"reward {name!r}: {len(without)} of {len(different)} prompts have no questions in {place}, "
            f"such as {without[0]!r}; allowed: its {len(questions)} prompts, or {name}:questions=FILE with a "
            'row {"prompt": ..., "vqa_list": [[question, answer], ...]} for each'
        )


def _asked(where: str, fields: Mapping[str, Any]) -> tuple[Question, ...]:
    """Return the questions of a row."""
    rows, skills = fields["vqa_list"], fields.get("skills")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{where}: vqa_list is {str(rows)[:60]!r}; allowed: [[question, answer], ...]")
    skills = [""] * len(rows) if skills is None else skills
    if not isinstance(skills, list) or len(skills) != len(rows):
        raise UserError(
            f"{where}: skills is {str(skills)[:60]!r} and vqa_list has {len(rows)} questions; allowed: a "
            "skill for each, or no skills"
        )
    return tuple(_question(where, row, skill) for row, skill in zip(rows, skills, strict=True))


def _question(where: str, row: Any, skill: Any) -> Question:
    if not isinstance(row, list) or len(row) != 2 or not all(isinstance(text, str) for text in [*row, skill]):
        raise UserError(
            f"{where}: {str(row)[:60]!r} of skill {skill!r}; allowed: [question, answer], of texts"
        )
    text, answer = (part.strip() for part in row)
    allowed = NUMBERS if text.startswith(_COUNTS) else [_YES]
    if not text or answer not in allowed:
        raise UserError(
            f"{where}: the answer to {text!r} is {answer!r}; allowed: {', '.join(allowed)} (a number after "
            f"{_COUNTS!r}, else {_YES})"
        )
    return Question(text, answer, skill)
