"""Tables and their files: local paths, fsspec URLs (``s3://``, ``gs://``, ``hf://``), web addresses.

A relative path in a table is searched under ``data.root``, else under the table's folder and the folders of
its schema; the error for a missing file names these folders.
"""

import base64
import binascii
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from diffalign.data.reading.downloads import Downloads
from diffalign.data.reading.references import ImageRef, MissingFileError
from diffalign.errors import UserError

WEB = ("http://", "https://")


BASE64 = tuple(
    base64.b64encode(head).decode().rstrip("=")[:-1]
    for head in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")
)
"""First letters of PNG, JPEG, WebP, GIF and TIFF files in base64."""
SHORTEST = 64  # letters; no image is smaller, and a path that begins so is seldom longer


def in_base64(text: str, place: str) -> bytes | None:
    """Return the image of a ``data:image/png;base64,`` address, or of base64 alone, recognised by the first
    bytes of image files; None: another text, such as a path.

    Raises:
        UserError: a data address that is no base64.
    """
    head, comma, body = text.partition(",")
    address = head.startswith("data:") and bool(comma)
    if not address and (len(text) < SHORTEST or not text.startswith(BASE64)):
        return None
    try:
        return base64.b64decode("".join((body if address else text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        if not address:
            return None
        raise UserError(
            f"{place}: {head[:40]!r} with content that is no base64 ({error}); allowed: "
            "data:image/png;base64,..."
        ) from error


def is_remote(path: str) -> bool:
    """Whether a path is a URL of fsspec's, ``s3://bucket/pairs.parquet`` and the like."""
    return "://" in path and not path.startswith("file://")


@dataclass(frozen=True)
class Remote:
    """A file by its fsspec URL."""

    url: str

    @property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.url).name

    def read(self) -> bytes:
        """Return the file's bytes; MissingFileError where there is none, OSError for what else goes wrong."""
        try:
            with remote(self.url), _fsspec().open(self.url, "rb") as file:
                content: bytes = file.read()
        except FileNotFoundError as error:
            raise MissingFileError(f"there is no {self.url}") from error
        except UserError as error:
            raise OSError(str(error)) from error
        return content


def _fsspec() -> Any:
    import fsspec

    return fsspec


@contextmanager
def remote(url: str) -> Iterator[None]:
    """Turn errors of a remote filesystem into a UserError with the URL.

    Raises:
        UserError: the protocol's package is missing (it names it), access is refused, the network is down.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except ImportError as error:
        raise UserError(f"{url}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # each filesystem has its own errors
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {first}") from error


@dataclass(frozen=True)
class Table:
    """A file of rows, local or remote."""

    place: str

    @cached_property
    def name(self) -> str:
        """The file's name."""
        return PurePosixPath(self.place).name

    @property
    def suffix(self) -> str:
        """The end of its name in lower case, with the dot."""
        return PurePosixPath(self.place).suffix.lower()

    @property
    def folder(self) -> str:
        """The table's folder."""
        return self.place.rpartition("/")[0] if is_remote(self.place) else str(Path(self.place).parent)

    @property
    def mark(self) -> tuple[Any, ...]:
        """A value that changes with the file: name, size and time, or the remote version."""
        if not is_remote(self.place):
            stat = Path(self.place).stat()
            return self.name, stat.st_size, stat.st_mtime_ns
        with remote(self.place):
            fs, path = _fsspec().core.url_to_fs(self.place)
            info: Mapping[str, Any] = fs.info(path)
        told = next(
            (info[key] for key in ("ETag", "etag", "LastModified", "created", "mtime") if info.get(key)), ""
        )
        return self.name, info.get("size"), str(told)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Open the file for reading bytes; UserError where that cannot be done."""
        if not is_remote(self.place):
            with Path(self.place).open("rb") as file:
                yield file
            return
        with remote(self.place):
            opened = _fsspec().open(self.place, "rb")
            file = opened.open()
        try:
            yield file
        finally:
            file.close()

    def opener(self, roots: Sequence[str], root: str | None, downloads: Downloads) -> "Opener":
        """Return the opener of the images in this table's cells."""
        return Opener(self.folder, self.name, tuple(roots), root, downloads)


@dataclass(frozen=True)
class Opener:
    """Images of a table's cells: bytes, datasets' {bytes, path}, a web address, base64, or a path.

    Attributes:
        folder: of the table, or its URL.
        table: its name, for messages; empty for rows that lie in no file.
        roots: folders that paths may be relative to, seen from ``folder``.
        root: ``data.root``, instead.
        downloads: of web addresses.
    """

    folder: str
    table: str
    roots: tuple[str, ...] = ("",)
    root: str | None = None
    downloads: Downloads = field(default_factory=Downloads)

    def __call__(self, value: Any, place: str) -> ImageRef | None:
        """Return the image of a cell, None where it is empty; UserError for what is no image.

        A list of one image is that image.
        """
        if isinstance(value, list | tuple):
            value = self._only(value, place)
        if isinstance(value, Mapping):
            if value and value.keys().isdisjoint({"bytes", "path"}):
                raise UserError(
                    f"{place}: an object of {', '.join(map(str, value))}; an image is a path, the bytes of a "
                    "file, or an object with one of them as path or bytes"
                )
            value = value.get("bytes") or value.get("path")
        if not value:
            return None
        if isinstance(value, bytes | bytearray | memoryview):
            return ImageRef(bytes(value))
        if not isinstance(value, str):
            raise UserError(f"{place}: {str(value)[:60]}; an image is a path, or the bytes of a file")
        if "\0" in value:
            raise UserError(f"{place}: {value[:60]!r}; a path has no null bytes")
        if value.startswith("file://"):
            value = url2pathname(urlsplit(value).path)
        if value.startswith(WEB):
            return ImageRef(self.downloads.of(value))
        embedded = in_base64(value, place)
        if embedded is not None:
            return ImageRef(embedded)
        if is_remote(value):
            return ImageRef(Remote(value))
        if is_remote(self.root or self.folder):
            return ImageRef(Remote(f"{(self.root or self.folder).rstrip('/')}/{value}"))
        told = "data.root" if self.root else f"the folder of {self.table}; data.root names another"
        base = Path(self.root).expanduser() if self.root else Path(self.folder)
        named = os.path.expanduser(value) if value.startswith("~/") else value
        spellings = [named] if "\\" not in named else [named, named.replace("\\", "/")]  # of Windows
        roots = [""] if self.root else self.roots
        first, *others = dict.fromkeys(base / root / name for root in roots for name in spellings)
        return ImageRef(first, tuple(others), f"paths are relative to {base}, {told}")

    @staticmethod
    def _only(values: Sequence[Any], place: str) -> Any:
        if len(values) > 1:
            raise UserError(
                f"{place}: a list of {len(values)} files in the place of one; allowed: one file a cell, a "
                "row for each pair, or a ranked list: columns images (all files) and ranks (1 is the best) "
                "or scores (higher is better)"
            )
        return values[0] if values else None


def tables_of(path: str, suffixes: Sequence[str]) -> list[Table]:
    """Return the tables that a path, a folder, a glob or a URL of one of them names, sorted.

    Raises:
        UserError: a remote place that cannot be read.
    """
    if is_remote(path):
        with remote(path):
            fs, bare = _fsspec().core.url_to_fs(path)
            scheme = path.partition("://")[0]
            if any(sign in bare for sign in "*?["):
                names = fs.glob(bare)
            elif fs.isdir(bare):
                names = [name for suffix in suffixes for name in fs.glob(f"{bare.rstrip('/')}/**/*{suffix}")]
            else:
                names = [bare] if fs.exists(bare) else []
        return [
            Table(f"{scheme}://{name.lstrip('/') if scheme != 'memory' else name}")
            for name in sorted(set(names))
        ]
    place = Path(path).expanduser()
    if place.is_dir():
        ends = tuple(suffixes)
        files = [file for file in place.rglob("*") if file.name.lower().endswith(ends) and file.is_file()]
        return [Table(str(file)) for file in sorted(files) if not _hidden(file, place)]
    if place.exists():
        return [Table(str(place))]
    return [Table(name) for name in sorted(glob(str(place), recursive=True))]


def _hidden(file: Path, root: Path) -> bool:
    """Return whether a part of the path begins with a dot: caches, and macOS's metadata files."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)
