"""Images at web addresses: fetched once and kept, with a limit and a list of missing ones.

A file is kept under the digest of its address. An address with status 404 or 410 is written into
``gone.jsonl`` in the folder and not requested again; after temporary errors (a timeout, a busy server) there
is a second try, and another in the next run. No file is larger than ``LARGEST``.
"""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from threading import Lock
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from diffalign.data.reading.references import MissingFileError
from diffalign.errors import UserError
from diffalign.utils.files import write_atomic
from diffalign.utils.text import read_json_lines

LARGEST = 64 * 2**20
"""Bytes of a file, at most."""

_SECONDS = 30  # timeout of a server
_TRIES = 2
_GONE = (404, 410)  # permanent statuses


def default_folder() -> Path:
    """Return the folder that images are kept in where none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffalign" / "images"


@dataclass(frozen=True)
class Fetched:
    """An image by its web address."""

    url: str
    downloads: "Downloads" = field(repr=False)

    @property
    def name(self) -> str:
        """The last part of the address."""
        return PurePosixPath(urlsplit(self.url).path).name or self.url

    def read(self) -> bytes:
        """Return the file's bytes, fetching it where it is not kept; OSError where that fails."""
        return self.downloads.read(self.url)


@dataclass
class Downloads:
    """The images of a set that have been fetched.

    Attributes:
        folder: where they are kept; None: ``default_folder()``.
        limit: number of images to fetch at most; None: all. Kept ones do not count.
    """

    folder: Path | None = None
    limit: int | None = None
    _lock: Lock = field(default_factory=Lock, repr=False)
    _busy: dict[str, Lock] = field(default_factory=dict, repr=False)
    _fetched: int = 0

    def of(self, url: str) -> Fetched:
        """Return the reference of an address."""
        return Fetched(url, self)

    def read(self, url: str) -> bytes:
        """Return the bytes of an address, from the folder or the web.

        Raises:
            MissingFileError: the server says that it is gone, or the limit is reached.
            OSError: it cannot be fetched now, or is larger than ``LARGEST``.
        """
        with self._lock:
            busy = self._busy.setdefault(url, Lock())
        with busy:  # two threads that need one image fetch it once
            return self._kept_or_fetched(url)

    def _kept_or_fetched(self, url: str) -> bytes:
        kept = self._place / blake2b(url.encode(), digest_size=16).hexdigest()
        if kept.is_file():
            return kept.read_bytes()
        with self._lock:
            if url in self._gone:
                raise MissingFileError(
                    f"{url} is gone ({self._gone[url]}, noted in {self._place / 'gone.jsonl'})"
                )
            if self.limit is not None and self._fetched >= self.limit:
                raise MissingFileError(f"{url} was not fetched: data.max_downloads is {self.limit}")
            self._fetched += 1
        content = self._fetch(url)
        write_atomic(kept, content)
        return content

    @cached_property
    def _place(self) -> Path:
        place = self.folder or default_folder()
        if place.exists() and not place.is_dir():
            raise UserError(f"data.downloads {str(place)!r} is a file; allowed: a folder")
        return place

    @cached_property
    def _gone(self) -> dict[str, str]:
        """Addresses of missing images, with the reason."""
        return {row["url"]: row["reason"] for row in read_json_lines(self._place / "gone.jsonl")}

    def _fetch(self, url: str) -> bytes:
        problem = ""
        for _ in range(_TRIES):
            try:
                with urlopen(Request(url, headers={"User-Agent": "diffalign"}), timeout=_SECONDS) as response:
                    content: bytes = response.read(LARGEST + 1)
            except HTTPError as error:
                problem = f"status {error.code}"
                if error.code in _GONE:
                    self._note(url, problem)
                    raise MissingFileError(f"{url} is gone ({problem})") from error
                if error.code < 500 and error.code not in (408, 429):
                    break
            except (URLError, OSError, ValueError) as error:
                problem = str(getattr(error, "reason", None) or error)
            else:
                if len(content) > LARGEST:
                    raise OSError(f"{url} is larger than {LARGEST // 2**20} MiB")
                return content
        raise OSError(f"{url} cannot be fetched: {problem}")

    def _note(self, url: str, reason: str) -> None:
        with self._lock:
            self._gone[url] = reason
            self._place.mkdir(parents=True, exist_ok=True)
            with (self._place / "gone.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"url": url, "reason": reason}) + "\n")
