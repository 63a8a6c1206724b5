"""References to image and video files: bytes, a local path, or a file elsewhere; digests of contents."""

import os
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Protocol, runtime_checkable

from diffalign.media.images import read_file


class MissingFileError(OSError):
    """A file that was not found; the message names the searched places."""


@runtime_checkable
class Elsewhere(Protocol):
    """A file that is not one known local path: remote, to be fetched, or under one of several folders."""

    @property
    def name(self) -> str:
        """The file's name."""
        ...

    def read(self) -> bytes:
        """Return its bytes; OSError where it cannot be read."""
        ...


@dataclass(frozen=True)
class ImageRef:
    """An image or video file.

    Attributes:
        source: its encoded bytes, or their place.
        others: further possible local paths, tried in order.
        root: the folder that its path is relative to, for messages.
    """

    source: bytes | Path | Elsewhere = field(repr=False)
    others: tuple[Path, ...] = field(default=(), repr=False)
    root: str = field(default="", repr=False)

    @property
    def name(self) -> str:
        """The file's name; empty for bytes."""
        return "" if isinstance(self.source, bytes) else self.source.name

    @property
    def file(self) -> Path | bytes:
        """The local path of the file where it has one, else its bytes; OSError where they cannot be read."""
        if not isinstance(self.source, Path):
            return self.source if isinstance(self.source, bytes) else self.source.read()
        if not self.others:
            return self.source
        return next((place for place in (self.source, *self.others) if os.path.isfile(place)), self.source)

    def read(self) -> bytes:
        """Return the bytes of the file.

        Raises:
            OSError: it cannot be read; MissingFileError where there is none.
        """
        found = self.file
        if isinstance(found, bytes):
            return found
        try:
            return read_file(found)
        except FileNotFoundError as error:
            places = " or ".join(str(place) for place in (found, *self.others))
            told = f" ({self.root})" if self.root else ""
            raise MissingFileError(f"No such file: looked for {places}{told}") from error


def digest(*parts: bytes) -> str:
    """Return the content's name: 128 bits of BLAKE2b in hexadecimal."""
    hasher = blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()
