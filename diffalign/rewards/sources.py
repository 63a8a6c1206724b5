"""Parse the source of a spec (the text after its colon): places and options.

A place is a file, a folder or a hub id (``FILE``, ``FILE@BACKBONE``); an option is ``name=value``. They are
joined by ``@``: ``mps:/models/mps.safetensors@threshold=0.3``. Options may stand alone:
``hpsv2:antialias=no``.
"""

import math
import re
from collections.abc import Collection
from pathlib import Path

from diffalign.errors import UserError, unknown
from diffalign.rewards.checkpoints import fetched, is_hub_id

_YES, _NO = ("yes", "true", "on"), ("no", "false", "off")


def places_and_options(
    name: str, source: str | None, places: int, options: Collection[str]
) -> tuple[list[str], dict[str, str]]:
    """Split a source into its places, padded with "" to ``places`` of them, and its options by name.

    Raises:
        UserError: too many places, or an unknown option.
    """
    named: list[str] = []
    values: dict[str, str] = {}
    for part in (source or "").split("@"):
        key, equals, value = part.partition("=")
        if equals and key in options:
            values[key] = value
        elif equals and re.fullmatch(r"\w+", key) and not Path(part).exists():
            raise unknown(f"option of the reward {name!r}:", key, options)
        else:
            named.append(part)
    if len(named) > places:
        raise UserError(f"reward {name!r}: {source!r} names {len(named)} places; allowed are {places}")
    return named + [""] * (places - len(named)), values


def yes_or_no(name: str, option: str, value: str) -> bool:
    """Parse the value of a yes/no option.

    Raises:
        UserError: the value is neither yes nor no (true, false, on and off are accepted as well).
    """
    if value.lower() not in _YES + _NO:
        raise UserError(f"reward {name!r}: {option}={value} must be yes or no")
    return value.lower() in _YES


def number(name: str, option: str, value: str) -> float:
    """Parse the value of a numeric option.

    Raises:
        UserError: the value is no finite number.
    """
    try:
        parsed = float(value)
    except ValueError:
        parsed = math.nan
    if not math.isfinite(parsed):
        raise UserError(f"reward {name!r}: {option}={value} must be a number")
    return parsed


def file_of(name: str, place: str, filename: str) -> Path:
    """Return the path of a weights file.

    ``place`` is the file itself, a folder that holds ``filename``, or a hub id to fetch ``filename`` from.

    Raises:
        UserError: the hub cannot be reached, or has no such file.
    """
    path = Path(place)
    if path.is_dir():
        return path / filename
    return fetched(name, place, filename) if is_hub_id(place) else path
