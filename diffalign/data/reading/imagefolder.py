"""Hugging Face image and video folders: files beside a ``metadata.jsonl``, ``.csv`` or ``.parquet``.

``file_name`` is the column ``image`` (or ``video``, by the file's ending), ``chosen_file_name`` is
``chosen``, and ``file_names`` and ``images_file_names`` are lists; the other columns are read as those of any
table. A folder of folders has a metadata file for each split.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.csv_files import csv_rows
from diffalign.data.reading.examples import Preferences
from diffalign.data.reading.files import Opener, Table
from diffalign.data.reading.json_files import json_rows
from diffalign.data.reading.layout import Layout
from diffalign.data.reading.splits import of_split
from diffalign.data.reading.tables import (
    as_preferences,
    downloads_of,
    layout_of,
    open_parquet,
    parquet_rows,
)
from diffalign.errors import UserError
from diffalign.media.videos import VIDEO_SUFFIXES

_READERS: Mapping[str, Callable[[Table], Iterator[tuple[str, Mapping[str, Any]]]]] = {
    ".jsonl": json_rows,
    ".csv": csv_rows,
    ".parquet": lambda table: parquet_rows(table, _columns(table)),
}


def metadata_of(folder: Path) -> list[Table]:
    """Return the metadata files of a folder, its own or those of its splits."""
    names = [f"metadata{suffix}" for suffix in _READERS]
    own = [folder / name for name in names if (folder / name).is_file()]
    below = sorted(file for name in names for file in folder.glob(f"*/{name}"))
    return [Table(str(file)) for file in own or below]


def read_imagefolder(config: DataConfig) -> Preferences:
    """Read a folder with metadata files.

    Raises:
        UserError: no schema that the columns follow, no column of file names, or no such split.
    """
    tables = metadata_of(Path(config.path).expanduser())
    notes: list[str] = []
    if len(tables) > 1 or config.split != "train":
        tables, notes = of_split(tables, str(Path(config.path).expanduser()), config.split)
    downloads = downloads_of(config)
    heads = [next(_rows(table), ("", {}))[1] for table in tables]
    layouts = [layout_of(head, table.place, config) for head, table in zip(heads, tables, strict=True)]

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for table, layout in zip(tables, layouts, strict=True):
            opener = table.opener(layout.schema.roots, config.root, downloads)
            yield from ((where, row, layout, opener) for where, row in _rows(table))

    return as_preferences(config, layouts[0], rows, None, None, notes=notes, everywhere=True, others=layouts)


def _rows(table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, row in _READERS[table.suffix](table):
        if not any(_is_file_name(name) for name in row):
            raise UserError(
                f"{where}: found {', '.join(row)}; needed file_name, or columns that end in _file_name"
            )
        yield where, dict(_named(name, value) for name, value in row.items())


def _is_file_name(name: str) -> bool:
    return name in ("file_name", "file_names") or name.endswith(("_file_name", "_file_names"))


def _named(name: str, value: Any) -> tuple[str, Any]:
    """Return a column under the name that tables have for it."""
    if name in ("file_name", "file_names"):
        first = value[0] if isinstance(value, list) and value else value
        kind = "video" if str(first).lower().endswith(tuple(VIDEO_SUFFIXES)) else "image"
        return f"{kind}s" if name == "file_names" else kind, value
    return name.removesuffix("_file_names").removesuffix("_file_name"), value


def _columns(table: Table) -> list[str]:
    with table.open() as file:
        names: list[str] = open_parquet(file, table).schema_arrow.names
        return names
