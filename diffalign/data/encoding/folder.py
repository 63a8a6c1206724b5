"""A folder of files, local or remote: ``runs/cache``, ``s3://bucket/cache``, ``memory://cache``.

Remote folders are read and written through fsspec. Their files are copied to a local folder before they are
read (they are memory-mapped); a file is written locally first and uploaded whole.
"""

import os
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

from diffalign.errors import UserError
from diffalign.utils.files import write_atomic

MIRROR = "DIFFALIGN_CACHE"  # environment variable: folder of local copies of remote files


class Folder:
    """Files of one folder by relative name; files are written atomically, and only ``write`` replaces one.

    Attributes:
        name: the path or address as given.
        local: the folder itself, or the local copies of a remote one.
        remote: whether the folder is remote.
    """

    def __init__(self, path: Path | str):
        """Raise UserError if the folder cannot be made, or if fsspec has no package for its protocol."""
        self.name = str(path)
        self.remote = "://" in self.name and not self.name.startswith("file://")
        self._fs: Any = None
        self._root = ""
        if self.remote:
            self._fs, self._root = _filesystem(self.name)
            home = Path(os.environ.get(MIRROR) or Path.home() / ".cache" / "diffalign")
            self.local = home / blake2b(self.name.rstrip("/").encode(), digest_size=8).hexdigest()
        else:
            self.local = Path(self.name.removeprefix("file://")).expanduser()
        try:
            self.local.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir {self.name!r} cannot be made: {error.strerror}") from error

    def __str__(self) -> str:
        return self.name

    def names(self, part: str) -> list[str]:
        """Return the sorted names, relative to the folder, of the files in a subfolder."""
        if not self.remote:
            place = self.local / part
            found = [entry.name for entry in os.scandir(place)] if place.is_dir() else []
        else:
            self._fs.invalidate_cache()
            try:
                listed = self._fs.ls(f"{self._root}/{part}", detail=False)
            except FileNotFoundError:
                listed = []
            found = [str(name).rsplit("/", 1)[-1] for name in listed]
        return sorted(f"{part}/{name}" for name in found if not name.startswith("."))

    def get(self, name: str) -> Path | None:
        """Return the local path of a file, copied here first if it is remote; None if there is none."""
        path = self.local / name
        if not self.remote or path.exists():
            return path if path.exists() else None
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f".{path.name}.{uuid4().hex}.tmp"
        try:
            self._fs.get_file(f"{self._root}/{name}", str(temporary))
            os.replace(temporary, path)
        except FileNotFoundError:
            return None
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def fresh(self, name: str) -> Path | None:
        """Return the local path of a file that other processes may have replaced; None if there is none."""
        if self.remote:
            (self.local / name).unlink(missing_ok=True)
        return self.get(name)

    def put(self, source: Path, name: str) -> None:
        """Move a complete local file, on the folder's own disk, into the folder."""
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, path)
        self._upload(path, name)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, replacing an older one of that name."""
        write_atomic(self.local / name, content)
        self._upload(self.local / name, name)

    def append(self, name: str, line: str) -> None:
        """Add a line to a small text file."""
        known = self.fresh(name)
        text = known.read_text(encoding="utf-8") if known else ""
        self.write(name, f"{text}{line}\n".encode())

    def temporary(self, part: str, suffix: str) -> Path:
        """Return a new name for a file that is being written, hidden from ``names``."""
        (self.local / part).mkdir(parents=True, exist_ok=True)
        return self.local / part / f".{uuid4().hex}{suffix}"

    def _upload(self, path: Path, name: str) -> None:
        if self.remote:
            target = f"{self._root}/{name}"
            self._fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(path), target)


def _filesystem(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it without a slash at its end."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UserError(f"{address!r}: {error}") from error
    return system, str(root).rstrip("/")


def local_copy(path: str) -> str:
    """Return a local path for a path that may be an address: what it names is copied here on first use.

    An address may name a file, a folder or a glob; of folders and globs all files are copied.
    Raises UserError if there is nothing, or no package for the protocol.
    """
    if "://" not in path:
        return path
    system, root = _filesystem(path)
    home = Path(os.environ.get(MIRROR) or Path(tempfile.gettempdir()) / "diffalign-sets")
    return str(_copied(system, root, home, path))


def _copied(system: Any, root: str, home: Path, address: str) -> Path:
    globbed = any(sign in root for sign in "*?[")
    files = system.glob(root) if globbed else system.find(root)
    files = [str(file) for file in files if not system.isdir(file)]
    if not files:
        raise UserError(f"data.path {address!r}: no such file or folder")
    stamp = [(file, system.info(file).get("size"), _changed(system.info(file))) for file in files]
    target = home / blake2b(repr((address, stamp)).encode(), digest_size=8).hexdigest()
    fixed = root.split("*")[0].rsplit("/", 1)[0] if globbed else root
    for file in files:
        name = file[len(fixed) :].lstrip("/") or root.rsplit("/", 1)[-1]
        place = target / name
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.parent / f".{place.name}.{uuid4().hex}.tmp"
            system.get_file(file, str(temporary))
            os.replace(temporary, place)
    if len(files) == 1 and files[0] == root:
        return target / root.rsplit("/", 1)[-1]
    return target


def _changed(info: dict[str, Any]) -> str:
    """Return a value that differs between versions of a remote file."""
    marks = ("etag", "ETag", "LastModified", "mtime", "created", "updated", "generation", "oid")
    return " ".join(str(info[mark]) for mark in marks if mark in info)
