"""Parsing of the cells of a row: numbers, yes or no, a choice of two, votes, lists.

One function decides what a number is (``number``), one what a yes or no is (``truth``), one what a choice of
two is (``choice``); the forms are in the tables ``EMPTY``, ``TRUE``, ``FALSE``, ``FIRST``, ``SECOND``
and ``TIE``.
An empty or not finite cell is no label, whatever other rows have.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError
from diffalign.utils.text import parse_json

EMPTY = frozenset({"", "none", "null", "nan", "na", "n/a", "inf", "-inf", "+inf", "infinity", "-infinity"})
TRUE = frozenset({"true", "1", "1.0", "yes", "y"})
FALSE = frozenset({"false", "0", "0.0", "no", "n"})
FIRST = frozenset(
    {"a", "first", "left", "image1", "image_1", "video1", "video_1", "model1", "image 1", "video 1"}
)
SECOND = frozenset(
    {"b", "second", "right", "image2", "image_2", "video2", "video_2", "model2", "image 2", "video 2"}
)
TIE = frozenset({"tie", "same", "equal", "both", "neither", "draw", "tied"})
COUNTED = frozenset(text for text in FIRST | SECOND if text[-1] in "12")
"""Texts that count images from 1."""
COUNTED_FIRST = frozenset(re.sub(r"[ _]", "", text) for text in FIRST & COUNTED)


@dataclass(frozen=True)
class Verdict:
    """A label: K scores, higher is better, and the K shares of votes behind them, if any."""

    scores: tuple[float, ...]
    votes: tuple[float, ...] = ()


def number(value: Any, name: str, where: str) -> float | None:
    """Return the number in a cell, None where it is empty or not finite.

    Raises:
        UserError: a text that is no number, or what is neither number, text nor bool.
    """
    if value is None or (isinstance(value, str) and value.strip().casefold() in EMPTY):
        return None
    if isinstance(value, str) and value.strip().casefold() in ("true", "false"):
        return float(value.strip().casefold() == "true")
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: {name} is {str(value)[:60]!r}; a label is a number (1, 0, or 0.5 twice for a tie) or "
            "empty"
        ) from error
    return found if math.isfinite(found) else None


def truth(value: Any, name: str, where: str) -> bool | None:
    """Return whether a cell says yes, None where it is empty.

    Raises:
        UserError: another text than those of ``TRUE`` and ``FALSE``, or another number than 1 and 0.
    """
    text = str(value).strip().casefold()
    if value is None or text in EMPTY:
        return None
    if text in TRUE or text in FALSE:
        return text in TRUE
    raise UserError(
        f"{where}: {name} is {value!r}; allowed: true, false, yes, no, 1, 0, or nothing where it is not known"
    )


def choice(value: Any, name: str, where: str, columns: Sequence[str] = ()) -> Verdict | None:
    """Return the label of a pair in one cell: a word, the name of a column, or the index of the preferred
    image (0 or 1; 0.5 is a tie).

    Args:
        value: the cell.
        name: of its column, for messages.
        where: for messages.
        columns: of the first and the second image or video. Where they are counted from 0 ("image_1" is the
            second one), no other text that ends in a number is taken: it may be counted from 1.

    Raises:
        UserError: another text or number.
    """
    text = str(value).strip().casefold()
    if value is None or text in EMPTY:
        return None
    named = [column.casefold() for column in columns]
    if text in named:
        return Verdict((1.0, 0.0) if text == named[0] else (0.0, 1.0))
    from_0 = len(named) == 2 and re.sub(r"[ _]", "", named[1]) in COUNTED_FIRST
    for texts, scores in ((FIRST, (1.0, 0.0)), (SECOND, (0.0, 1.0)), (TIE, (0.5, 0.5))):
        if text in texts and not (from_0 and text in COUNTED):
            return Verdict(scores)
    try:
        return {0.0: Verdict((1.0, 0.0)), 1.0: Verdict((0.0, 1.0)), 0.5: Verdict((0.5, 0.5))}[float(text)]
    except (KeyError, ValueError) as error:
        words = ", ".join(columns) if from_0 else "image1, image2"
        raise UserError(
            f"{where}: {name} is {value!r}; allowed: A, B, same, first, second, left, right, {words}, tie, "
            "the index of the preferred one (0 or 1), or nothing"
        ) from error


def shares(first: float | None, second: float | None, name: str, where: str) -> Verdict | None:
    """Return the label of two counts or shares of votes; None where one is missing or nobody voted.

    Raises:
        UserError: a negative number of votes.
    """
    if first is None or second is None:
        return None
    if min(first, second) < 0:
        raise UserError(f"{where}: {name} is {first:g} and {second:g}; votes are 0 or more")
    total = first + second
    if not total:
        return None
    votes = (first / total, second / total)
    return Verdict(votes, votes)


def cell(row: Any, path: str) -> Any:
    """Return the value at a dotted path of a row, None where a step is missing; a number indexes a list.

    A column whose name has dots has precedence.
    """
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, _, rest = path.partition(".")
    if isinstance(row, Mapping):
        value = row.get(head)
    elif isinstance(row, Sequence) and not isinstance(row, str | bytes) and head.isdigit():
        value = row[int(head)] if int(head) < len(row) else None
    else:
        return None
    return cell(value, rest) if rest else value


def listed(value: Any, name: str, where: str) -> Sequence[Any] | None:
    """Return the list in a cell, None where it is empty; UserError for what is no list."""
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{where}: {name} is {str(value)[:60]}; allowed: a list of numbers, one an image")
    return value


def mapping(value: Any, name: str, where: str) -> Mapping[str, Any] | None:
    """Return the object in a cell, also where it is written as JSON text; UserError for what is none."""
    if isinstance(value, str) and value.strip():
        value = parse_json(value, f"{where}: {name}")
    if value is None or value == "":
        return None
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {name} is {str(value)[:60]!r}; allowed: an object, or its JSON text")
    return value
