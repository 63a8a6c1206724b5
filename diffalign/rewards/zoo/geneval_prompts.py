"""Parse GenEval's prompts (Ghosh et al. 2023, arXiv 2310.11513) into requirements. There are six templates:

    a photo of a bench                          single_object
    a photo of a bench and a sports ball        two_object
    a photo of three clocks                     counting
    a photo of a pink car                       colors
    a photo of a dog right of a teddy bear      position
    a photo of a purple cup and a black apple   color_attr

For all 553 published prompts the parsed requirement equals the published metadata, so a score needs only the
prompt. Names, articles and plurals (``computer mouses``) are the benchmark's own.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from diffalign.errors import UserError

OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote",
    "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book",
    "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
"""COCO's 80 classes in COCO's order, three of them renamed for clarity."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
"""Number words; the published prompts go up to four."""


@dataclass(frozen=True)
class Clause:
    """A number of objects of one class, with an optional colour and position.

    Attributes:
        name: class, one of ``OBJECTS``.
        count: number of objects.
        colour: one of ``COLOURS``; None: any.
        position: one of ``RELATIONS``, and the index in ``Requirement.include`` of the clause that it relates
            to; None: anywhere.
    """

    name: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Requirement:
    """The requirement of a prompt.

    Attributes:
        tag: GenEval's task.
        include: clauses that must all hold.
        exclude: clauses of which none may hold.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def _any_of(names: tuple[str, ...] | dict[str, int], label: str) -> str:
    longest_first = sorted(names, key=len, reverse=True)
    return f"(?P<{label}>{'|'.join(map(re.escape, longest_first))})"


_PLURALS = {f"{name}es" if name.endswith("s") else f"{name}s": name for name in OBJECTS}
_A, _B = _any_of(OBJECTS, "a"), _any_of(OBJECTS, "b")
_COLOUR_A, _COLOUR_B = _any_of(COLOURS, "colour_a"), _any_of(COLOURS, "colour_b")
_TEMPLATES = {
    "single_object": rf"an? {_A}",
    "two_object": rf"an? {_A} and an? {_B}",
    "counting": rf"{_any_of(NUMBERS, 'number')} {_any_of(tuple(_PLURALS), 'a')}",
    "colors": rf"an? {_COLOUR_A} {_A}",
    "position": rf"an? {_A} {_any_of(RELATIONS, 'relation')} an? {_B}",
    "color_attr": rf"an? {_COLOUR_A} {_A} and an? {_COLOUR_B} {_B}",
}
_PATTERNS = {tag: re.compile(rf"a photo of {template}") for tag, template in _TEMPLATES.items()}


@lru_cache(maxsize=4096)
def read_requirement(prompt: str) -> Requirement:
    """Parse a prompt of GenEval into its requirement.

    Raises:
        UserError: the prompt follows none of the templates, or names one class twice.
    """
    text = prompt.strip().lower().removesuffix(".")
    matches = ((tag, pattern.fullmatch(text)) for tag, pattern in _PATTERNS.items())
    tag, matched = next(((tag, match.groupdict()) for tag, match in matches if match), ("", {}))
    if not tag:
        raise UserError(
            f"reward 'geneval' cannot read the prompt {prompt!r}; it reads GenEval's: 'a photo of a bench', "
            "'a photo of a bench and a cup', 'a photo of three clocks', 'a photo of a pink car', 'a photo of "
            "a dog right of a bench', 'a photo of a purple cup and a black apple', with COCO's 80 objects "
            f"and {', '.join(COLOURS)}"
        )
    if matched["a"] == matched.get("b"):
        raise UserError(
            f"reward 'geneval' cannot read the prompt {prompt!r}: it names {matched['a']!r} twice, and "
            "things are counted by their names; for two of them write a number"
        )
    return _requirement(tag, matched)


def _requirement(tag: str, matched: dict[str, str]) -> Requirement:
    if tag == "counting":
        name, count = _PLURALS[matched["a"]], NUMBERS[matched["number"]]
        return Requirement(tag, (Clause(name, count),), (Clause(name, count + 1),))
    if tag == "position":  # clause 0 is the object that the first-named one relates to
        second = Clause(matched["a"], position=(matched["relation"], 0))
        return Requirement(tag, (Clause(matched["b"]), second))
    first = Clause(matched["a"], colour=matched.get("colour_a"))
    return Requirement(
        tag, (first, Clause(matched["b"], colour=matched.get("colour_b"))) if "b" in matched else (first,)
    )
