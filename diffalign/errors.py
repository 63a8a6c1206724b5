"""Errors that a user can correct; the command line prints one line and exits with status 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message names the value, the place, and what is allowed."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """Return the UserError for a name that is not in ``allowed``.

    Example: ``unknown method 'dop'; did you mean dpo? allowed: dpo, sft``.
    """
    names = sorted(set(allowed))
    close = close_to(str(name), names)
    hint = f"; did you mean {' or '.join(close)}?" if close else ";"
    return UserError(f"unknown {kind} {name!r}{hint} allowed: {', '.join(names)}")


def close_to(name: str, names: Iterable[str]) -> list[str]:
    """Return at most three of ``names`` that are similar to ``name``, the most similar first."""
    folded = {other: other.casefold() for other in names}  # a name in capitals is close to its own
    found = get_close_matches(name.casefold(), list(folded.values()), n=3, cutoff=0.5)
    close = [other for text in dict.fromkeys(found) for other in folded if folded[other] == text]
    letters = sorted(name.casefold())
    return sorted(close, key=lambda other: sorted(folded[other]) != letters)[:3]  # swapped letters come first


class Paused(Exception):
    """Raised by a source to end the run cleanly until something external happens.

    The run continues with ``--resume latest``; the message says what it waits for.
    """
