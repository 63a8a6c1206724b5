"""Check output paths before any work is done."""

import os
from pathlib import Path

from diffalign.errors import UserError
from diffalign.utils.text import user_path

_FOLDER, _FILE = "a folder, new or there already", "a file, new or there already"


def folder_to_write(text: str) -> Path:
    """Return the path of an output folder, which may exist.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    path = place_to_write(text, _FOLDER)
    if path.exists() and not path.is_dir():
        raise UserError(f"{text!r} is a file; allowed: {_FOLDER}")
    return path


def file_to_write(text: str) -> Path:
    """Return the path of an output file, which may exist.

    Raises:
        UserError: it is a folder, or cannot be written.
    """
    path = place_to_write(text, _FILE)
    if path.is_dir():
        raise UserError(f"{text!r} is a folder; allowed: {_FILE}")
    return path


def place_to_write(text: str, allowed: str = "a file or a folder, new or there already") -> Path:
    """Return the path of an output file or folder; ``allowed`` describes allowed values in messages.

    Raises:
        UserError: the name is empty, a dangling link, below a file, or below a folder without write access.
    """
    if not text.strip():
        raise UserError(f"{text!r} is no name; allowed: {allowed}")
    path = user_path(text)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{text!r} is a link to nothing; allowed: {allowed}")
    existing = next((place for place in (path, *path.parents) if place.exists()), path)
    if existing != path and not existing.is_dir():
        raise UserError(f"{text!r}: {str(existing)!r} is a file; allowed: {allowed}")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{text!r}: {str(existing)!r} cannot be written; allowed: {allowed}")
    return path
