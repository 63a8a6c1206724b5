"""Webdataset shards: tar files whose members ``KEY.FIELD`` of one key make a row.

``.json`` members are objects of fields, ``.txt`` and ``.cls`` texts; a file's own ending (``jpg_0.jpg``,
``caption.txt``) is not part of the field's name. A lone ``KEY.jpg`` is the field ``image``, a lone
``KEY.txt`` the caption. Shards are read in the order of their names, as streams.
"""

import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Preferences, digest
from diffalign.data.reading.files import Opener, Table
from diffalign.data.reading.layout import Layout
from diffalign.data.reading.tables import as_preferences, downloads_of, files_of, first_line, layout_of
from diffalign.errors import UserError
from diffalign.media.videos import VIDEO_SUFFIXES
from diffalign.utils.text import decode, parse_json

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")
_VIDEOS = tuple(suffix[1:] for suffix in VIDEO_SUFFIXES)
_TEXTS = ("txt", "text", "cls", "caption")


def read_webdataset(config: DataConfig) -> Preferences:
    """Read tar shards by path, glob, folder or URL.

    Raises:
        UserError: none, a damaged one, or no schema that the fields of its first row follow.
    """
    tables, notes = files_of(config, SUFFIXES, "tar")
    downloads = downloads_of(config)
    layouts: list[Layout] = []
    for table in tables:
        first = next(tar_rows(table), None)
        if first is None:
            raise UserError(f"{table.place}: no rows in it")
        layouts.append(layout_of(first[1], table.place, config))

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for table, layout in zip(tables, layouts, strict=True):
            opener = table.opener(layout.schema.roots, config.root, downloads)
            yield from ((where, row, layout, opener) for where, row in tar_rows(table))

    mark = digest(repr([table.mark for table in tables]).encode())
    return as_preferences(config, layouts[0], rows, None, mark, notes=notes, others=layouts)


def tar_rows(table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("file key", fields) of the rows of a shard; UserError where it is damaged."""
    key, row = None, dict[str, Any]()
    try:
        with table.open() as file, tarfile.open(fileobj=file, mode="r|*") as shard:
            for member in shard:
                folder, _, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("."):
                    continue
                stem, _, end = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key and row:
                    yield f"{table.name} {key}", row
                    row = {}
                key = this
                opened = shard.extractfile(member)
                row |= _fields(end, opened.read() if opened else b"", f"{table.name} {member.name}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{table.place}: not a whole tar file ({first_line(error)})") from error
    if row:
        yield f"{table.name} {key}", row


def _fields(end: str, content: bytes, where: str) -> dict[str, Any]:
    """Return the fields that a member gives; UserError for json or text that is none."""
    name, _, kind = end.lower().rpartition(".")
    kind, name = (kind, name) if name or kind in (*_IMAGES, *_VIDEOS, *_TEXTS, "json") else ("", kind)
    if kind == "json":
        value = parse_json(decode(content, where), where)
        return value if isinstance(value, dict) and not name else {name or "json": value}
    if kind in _TEXTS:
        return {name or "caption": decode(content, where).strip()}
    if kind in _IMAGES:
        return {name or "image": content}
    if kind in _VIDEOS:
        return {name or "video": content}
    field = f"{name}.{kind}" if name and kind else name or kind
    return {field: content if _is_file(field) else decode(content, where).strip()}


def _is_file(field: str) -> bool:
    """Return whether a field without a known ending is a file by its name, such as ``jpg_0``."""
    return field.startswith(("jpg", "png", "webp", "image", "video", "chosen", "rejected", "path"))
