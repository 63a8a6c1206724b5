"""A lock on a folder: one process at a time may write it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffalign.errors import UserError

_BEYOND = 1 << 30  # bytes


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
    """Lock an open file until it is closed, and return whether the lock was free.

    A file system without locks counts as free. Windows locks a byte far beyond the end, since nobody
    there can read or write what is locked.
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
