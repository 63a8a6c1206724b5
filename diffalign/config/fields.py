"""Fields of a configuration: default, help text and allowed values. Pure Python.

``option`` stores help text and rule in the field's metadata, from which the command line's help and the check
of ranges are made.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_type_hints

Rule = tuple[Callable[[Any], bool], str]
"""A predicate of allowed values, and their description for messages."""


def option(default: Any, text: str, rule: Rule | None = None, with_commas: bool = False) -> Any:
    """Return a dataclass field with a help text and a rule for its values; None always passes.

    ``with_commas``: the entries of a list may hold commas, so a flag's text is one entry.
    """
    metadata = {"help": text, "rule": rule, "with_commas": with_commas}
    return dataclasses.field(default=default, metadata=metadata)


def mapping_option(factory: Callable[[], Any], text: str) -> Any:
    """Return a dataclass field with a default factory and a help text."""
    return dataclasses.field(default_factory=factory, metadata={"help": text, "rule": None})


def section(cls: type) -> Any:
    """Return a dataclass field that holds a section: an instance of ``cls`` with its defaults."""
    return dataclasses.field(default_factory=cls)


def options(cls: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield (dotted name, field, type) for every option of a tree of dataclasses and its nested sections."""
    kinds = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, kind


def rules_of(cls: Any) -> Mapping[str, Rule]:
    """Return the rules of a tree of dataclasses by dotted name."""
    return {name: field.metadata["rule"] for name, field, _ in options(cls) if field.metadata.get("rule")}


def at_least(low: float) -> Rule:
    """Return the rule for numbers of at least ``low``."""
    return (lambda v: v >= low), f"{low:g} or more"


def between(low: int, high: int) -> Rule:
    """Return the rule for whole numbers from ``low`` to ``high``."""
    return (lambda v: low <= v <= high), f"{low} to {high:,}"


def multiple(step: int, high: int = 2**15) -> Rule:
    """Return the rule for positive multiples of ``step`` up to ``high``: sides of images, in pixels."""
    return (lambda v: 0 < v <= high and v % step == 0), f"a positive multiple of {step}, up to {high:,}"


POSITIVE: Rule = (lambda v: v > 0), "more than 0"
SHARE: Rule = (lambda v: 0 <= v <= 1), "0 to 1"
BELOW_ONE: Rule = (lambda v: 0 <= v < 1), "0 or more and less than 1"
PART: Rule = (lambda v: 0 < v <= 1), "more than 0, up to 1"
NAMES: Rule = (lambda v: all(one.strip() for one in v)), "names, none of them empty"
SOME_NAMES: Rule = (lambda v: bool(v) and all(one.strip() for one in v)), "at least one name"
FOLDER: Rule = (lambda v: bool(v.strip()) and "\0" not in v), "a folder name"
SEED: Rule = (lambda v: 0 <= v < 2**63), "0 to 2^63 - 1"
COUNT = between(1, 2**31 - 1)
COUNT_OR_ZERO = between(0, 2**31 - 1)
BATCH = between(1, 2**16)
