"""Locks on folders, so that one process at a time writes to a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.errors import UserError

_BEYOND = 1 << 30  # byte that is locked on Windows, far beyond the end of the file


@contextmanager
def locked(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of ``folder`` inside the context; the folder is created if needed.

    The operating system releases the lock when the process ends, also after a crash; the lock file stays.

    Raises:
        UserError: another process holds the lock (the message names it), or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        if not try_lock(descriptor):
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


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; return whether the lock was free.

    On a file system without locks it counts as free. On Windows the lock is on a byte far beyond the end of
    the file, since locked bytes cannot be read there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(descriptor, _BEYOND, os.SEEK_SET)
        try:
            with suppress(OSError):
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                return True
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
