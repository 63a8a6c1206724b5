"""A lock on a folder: one process at a time may write it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.errors import UserError


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of ``folder``, which is made, while entered.

    The operating system gives the lock back when the process ends, however it ends; the file stays.

    Raises:
        UserError: another process holds it; the message names that process.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        if not _lock(descriptor):
            holder = os.pread(descriptor, 100, 0).decode(errors="replace") if hasattr(os, "pread") else ""
            raise UserError(
                f"another run writes {folder} ({holder.strip() or 'an unknown process'}); allowed: to wait "
                "until it has ended, or another --output"
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Return whether the lock was free; a file system without locks counts as free."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        with suppress(OSError):
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            return True
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
