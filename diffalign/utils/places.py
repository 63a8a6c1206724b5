"""Places to write to: whether something can be written there, as far as can be told before it is."""

import os
from pathlib import Path

from diffalign.errors import UserError
from diffalign.utils.text import user_path

_FOLDER, _FILE = "a folder, new or there already", "a file, new or there already"


def folder_to_write(text: str) -> Path:
    """Return the path of a folder to write into, which may be there already; UserError where none can be."""
    path = place_to_write(text, _FOLDER)
    if path.exists() and not path.is_dir():
        raise UserError(f"{text!r} is a file; allowed: {_FOLDER}")
    return path


def file_to_write(text: str) -> Path:
    """Return the path of a file to write, which may be there already; UserError where none can be."""
    path = place_to_write(text, _FILE)
    if path.is_dir():
        raise UserError(f"{text!r} is a folder; allowed: {_FILE}")
    return path


def place_to_write(text: str, allowed: str = "a file or a folder, new or there already") -> Path:
    """Return the path of a file or a folder to write; UserError where nothing can be written there."""
    if not text.strip():
        raise UserError(f"{text!r} is no name; allowed: {allowed}")
    path = user_path(text)
    if path.is_symlink() and not path.exists():
        raise UserError(f"{text!r} is a link to nothing; allowed: {allowed}")
    above = next((place for place in (path, *path.parents) if place.exists()), path)
    if above != path and not above.is_dir():
        raise UserError(f"{text!r}: {str(above)!r} is a file; allowed: {allowed}")
    if not os.access(above, os.W_OK):
        raise UserError(f"{text!r}: {str(above)!r} cannot be written; allowed: {allowed}")
    return path
