"""Label columns of schemas: conversion of each form of a label to scores and votes.

A class returns a Verdict, or None where the row has no label. Single cells are parsed in ``cells``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from diffalign.data.reading.cells import Verdict, cell, choice, listed, mapping, number, shares, truth
from diffalign.errors import UserError
from diffalign.utils.text import parse_json


@runtime_checkable
class Label(Protocol):
    """The reader of a row's label."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it needs."""
        ...

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns that it reads if they exist."""
        ...

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the label; None where the row has none."""
        ...


@dataclass(frozen=True)
class Ordered:
    """The first is preferred; ``confidence`` and ``votes`` name columns of P(0 > 1) and of two counts,
    ``tie`` one that says whether neither is.
    """

    confidence: str | None = None
    votes: str | None = None
    tie: str | None = None
    columns: tuple[str, ...] = ()

    @property
    def optional(self) -> tuple[str, ...]:
        """The columns of confidence, votes and ties."""
        return tuple(name for name in (self.confidence, self.votes, self.tie) if name)

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return (1, 0), with the share of votes where it agrees with the order; a tie where it is one."""
        if self.tie and truth(cell(row, self.tie), self.tie, where):
            return Verdict((0.5, 0.5))
        share = number(cell(row, self.confidence), self.confidence, where) if self.confidence else None
        counts = listed(cell(row, self.votes), self.votes, where) if self.votes and share is None else None
        if counts and self.votes and len(counts) == 2:
            first, second = (number(count, self.votes, where) for count in counts)
            told = shares(first, second, self.votes, where)
            share = told.votes[0] if told else None
        if share is not None and not 0 <= share <= 1:
            raise UserError(f"{where}: {self.confidence} is {share:g}; allowed: a share from 0 to 1")
        return Verdict((1.0, 0.0), (share, 1 - share) if share is not None and share > 0.5 else ())


@dataclass(frozen=True)
class Scored:
    """Two columns of numbers from 0 to 1; equal is a tie, and 0 and 0 is Pick-a-Pic's "not judged".

    ``flag`` is a column that is true where there is a label.
    """

    columns: tuple[str, str] = ("label_0", "label_1")
    flag: str = "has_label"

    @property
    def optional(self) -> tuple[str, ...]:
        """The flag's column."""
        return (self.flag,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the two numbers."""
        if truth(row.get(self.flag), self.flag, where) is False:
            return None
        numbers = [number(row.get(name), name, where) for name in self.columns]
        for name, value in zip(self.columns, numbers, strict=True):
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{where}: {name} is {value:g}; allowed: 1, 0, 0.5 twice for a tie, or empty")
        first, second = numbers
        if first is None or second is None or first == second == 0:
            return None
        return Verdict((0.5, 0.5) if first == second else (first, second))


@dataclass(frozen=True)
class BestUid:
    """The id of the preferred image against those of both; "tie" is a tie."""

    columns: tuple[str, ...] = ("best_image_uid", "image_0_uid", "image_1_uid")
    optional: tuple[str, ...] = ("has_label",)

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return (1, 0) or (0, 1); None if it is neither."""
        if truth(row.get("has_label"), "has_label", where) is False:
            return None
        best, first, second = (row.get(name) for name in self.columns)
        known = {first: (1.0, 0.0), second: (0.0, 1.0), "tie": (0.5, 0.5)}
        return Verdict(known[best]) if best and best in known else None


class OneColumn:
    """A kind of label in one column, ``column``."""

    column: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the labels."""
        return (self.column,)


@dataclass(frozen=True)
class Listed(OneColumn):
    """A list of numbers, one an image; ``ranks``: 1 is the best."""

    column: str = "scores"
    ranks: bool = False
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the numbers, of ranks their negatives; None where one is missing."""
        values = listed(cell(row, self.column), self.column, where)
        if values is None:
            return None
        scores = [number(value, "a score", where) for value in values]
        known = tuple(-score if self.ranks else score for score in scores if score is not None)
        return Verdict(known) if len(known) == len(scores) else None


@dataclass(frozen=True)
class Votes:
    """Two columns of votes, counts or shares; equal ones are a tie."""

    columns: tuple[str, str]
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the shares."""
        first, second = (number(cell(row, name), name, where) for name in self.columns)
        return shares(first, second, " and ".join(self.columns), where)


@dataclass(frozen=True)
class Tally(OneColumn):
    """Two counts of votes in one cell: a list, an object of two numbers in the images' order, or its JSON."""

    column: str
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the shares."""
        value = cell(row, self.column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = parse_json(value, f"{where}: {self.column}")
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            counts = list(value)
        else:
            found = mapping(value, self.column, where)
            counts = [] if found is None else list(found.values())
            if found is None:
                return None
        if len(counts) != 2:
            raise UserError(f"{where}: {self.column} has {len(counts)} counts; allowed: two")
        first, second = (number(one, self.column, where) for one in counts)
        return shares(first, second, self.column, where)


@dataclass(frozen=True)
class Choice(OneColumn):
    """One cell with the better one of two; ``rivals`` are the columns of the two, which it may name."""

    column: str
    optional: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the pair's label."""
        return choice(cell(row, self.column), self.column, where, self.rivals)


@dataclass(frozen=True)
class Liked:
    """A yes or no of a single image; ``always`` where every row is a demonstration."""

    column: str = "liked"
    always: bool = False
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The column of the answer."""
        return () if self.always else (self.column,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return 1 for liked, 0 for not."""
        answer = True if self.always else truth(cell(row, self.column), self.column, where)
        return None if answer is None else Verdict((float(answer),))


@dataclass(frozen=True)
class Rating:
    """The mean of numeric columns of one image, ``low`` to ``high`` being their scale, higher is better.

    A row whose prompt has no other row is liked above the middle of the scale and disliked below it.
    ``rank``: lower is better, and a single row has no label.
    """

    columns: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0
    rank: bool = False
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the mean of the existing numbers; None if there are none."""
        values = [number(cell(row, name), name, where) for name in self.columns]
        known = [value for value in values if value is not None]
        if not known:
            return None
        mean = sum(known) / len(known)
        return Verdict((-mean if self.rank else mean,))


@dataclass(frozen=True)
class Checklist(OneColumn):
    """The share of yes in a list of answers (1 or 0) about one image; a mask of 1 and 0 selects the answers
    that count.
    """

    column: str = "meta_result"
    mask: str = "meta_mask"
    low: float = 0.0
    high: float = 1.0
    rank: bool = False

    @property
    def optional(self) -> tuple[str, ...]:
        """The column of the mask."""
        return (self.mask,)

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the share of yes."""
        answers = listed(row.get(self.column), self.column, where)
        mask = listed(row.get(self.mask), self.mask, where) or [1] * len(answers or ())
        asked = [answer for answer, shown in zip(answers or (), mask, strict=False) if shown]
        return Verdict((sum(bool(answer) for answer in asked) / len(asked),)) if asked else None


@dataclass(frozen=True)
class PerModel(OneColumn):
    """An object of lists of ratings by model; the images are in columns named after the models."""

    column: str = "HumanRatings"
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the mean rating of each model, in the object's order."""
        found = mapping(row.get(self.column), self.column, where)
        if not found:
            return None
        means = []
        for model, values in found.items():
            values = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
            known = [n for n in (number(v, f"{self.column}.{model}", where) for v in values) if n is not None]
            if not known:
                return None
            means.append(sum(known) / len(known))
        return Verdict(tuple(means))


@dataclass(frozen=True)
class Conversation(OneColumn):
    """The last answer of a conversation, which ends in "Image 1 is better" or the like."""

    column: str = "conversations"
    optional: tuple[str, ...] = ()

    def __call__(self, row: Mapping[str, Any], where: str) -> Verdict | None:
        """Return the answer's preference; None if it has none."""
        told = re.findall(
            r"(?:image|video)\s*([12])\s+is\s+better", str(cell(last(row, self.column), "value")), re.I
        )
        return choice(f"image{told[-1]}", self.column, where) if told else None


def last(row: Mapping[str, Any], column: str) -> Any:
    """Return the last entry of a list in a row, None where there is none."""
    values = row.get(column)
    return values[-1] if isinstance(values, Sequence) and not isinstance(values, str) and values else None
