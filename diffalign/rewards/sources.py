"""What a spec says after its colon: places, ``FILE`` or ``FILE@BACKBONE``, and options, ``name=value``.

All are joined by ``@``: ``mps:/models/mps.safetensors@threshold=0.3``. Options need no place before them:
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
    """Return the places of a source, filled up with "" to ``places`` of them, and its options by name.

    Raises:
        UserError: too many places, or an option that there is not.
    """
    found: list[str] = []
    values: dict[str, str] = {}
    for part in (source or "").split("@"):
        key, equals, value = part.partition("=")
        if equals and key in options:
            values[key] = value
        elif equals and re.fullmatch(r"\w+", key) and not Path(part).exists():
            raise unknown(f"option of the reward {name!r}:", key, options)
        else:
            found.append(part)
    if len(found) > places:
        raise UserError(f"reward {name!r}: {source!r} names {len(found)} places; allowed are {places}")
    return found + [""] * (places - len(found)), values


def yes_or_no(name: str, option: str, value: str) -> bool:
    """Return the value of an option that is on or off.

    Raises:
        UserError: it is neither yes nor no.
    """
    if value.lower() not in _YES + _NO:
        raise UserError(f"reward {name!r}: {option}={value} must be yes or no")
    return value.lower() in _YES


def number(name: str, option: str, value: str) -> float:
    """Return the value of an option that is a number.

    Raises:
        UserError: it is no finite number.
    """
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"reward {name!r}: {option}={value} must be a number")
    return found


def file_of(name: str, place: str, filename: str) -> Path:
    """Return a file of weights: ``place`` itself, ``filename`` in it if it is a folder, or fetched from that
    hub id.

    Raises:
        UserError: the hub cannot be reached, or has no such file.
    """
    path = Path(place)
    if path.is_dir():
        return path / filename
    return fetched(name, place, filename) if is_hub_id(place) else path
