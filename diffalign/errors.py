"""Errors that a user can mend. The command line prints them in one line and exits with status 2."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input: the message names the value, the place, and what is allowed."""


def unknown(kind: str, name: object, allowed: Iterable[str]) -> UserError:
    """A UserError for a name that is not in a set: ``unknown method 'dop'; did you mean dpo? (allowed:
    dpo, sft)``.
    """
    names = sorted(allowed)
    close = get_close_matches(str(name), names, n=3, cutoff=0.5)
    close.sort(key=lambda other: sorted(other) != sorted(str(name)))  # letters that changed places come first
    hint = f"; did you mean {' or '.join(close)}?" if close else ";"
    return UserError(f"unknown {kind} {name!r}{hint} allowed: {', '.join(names)}")
