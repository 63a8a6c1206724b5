"""Atomic files and folders: written beside their place as ``.NAME.*.tmp``, then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from diffalign.errors import UserError


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` on a clean exit, and is deleted after an error.

    The parent folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file atomically (text as UTF-8), creating its folder."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` on a clean exit, and is deleted after an error.

    Raises:
        UserError: ``folder`` cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.is_file():
            raise UserError(f"{folder} is a file; allowed: a new folder")
        temporary = Path(tempfile.mkdtemp(".tmp", f".{folder.name}.", folder.parent))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        temporary.chmod(0o755)  # mkdtemp's mode is 0700
        yield temporary
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(new: Path, folder: Path) -> None:
    """Rename ``new`` to ``folder``; an existing ``folder`` is moved aside first and deleted last."""
    if not folder.exists():
        os.replace(new, folder)
        return
    aside = Path(tempfile.mkdtemp(".tmp", f".{folder.name}.old.", folder.parent))
    os.replace(folder, aside / folder.name)
    os.replace(new, folder)
    shutil.rmtree(aside)
