"""Files of prompts: text lines, json lines, tables. One reader for each, all giving (place, fields) rows."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.reading.csv_files import csv_columns, csv_rows
from diffalign.data.reading.files import Opener, Table
from diffalign.data.reading.json_files import json_rows
from diffalign.data.reading.sources import holds_no_image, names_a_source, source_columns
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.utils.text import text_lines

COLUMNS = ("prompt", "prompts", "caption", "text", "prompt_en", "instruction", "edit_instruction")
"""Names of the prompt's column or field, in any case; the first one present counts."""

CATEGORIES = ("category", "categories")
"""Names of the category's column or field, likewise."""

AXES = ("task_type", "instruction_language")
"""Further columns that published sets have categories in."""

FORMATS = ".txt, .jsonl, .json, .tsv, .csv, .parquet"

Row = tuple[str, Mapping[str, Any]]
"""A row's place, for messages, and its fields by name."""


def file_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a file; a text file's have one field, ``prompt``.

    Raises:
        UserError: the file is of another kind, not UTF-8, damaged, or has no prompts' column.
    """
    readers: Mapping[str, Callable[[Path], Iterator[Row]]] = {
        ".txt": _lines, ".jsonl": _json, ".json": _json, ".tsv": _table, ".csv": _table, ".parquet": _parquet,
    }  # fmt: skip
    if file.suffix.lower() not in readers:
        raise UserError(
            f"prompt file {str(file)!r}: cannot read {file.suffix or 'a file without suffix'}; "
            f"allowed: {FORMATS}"
        )
    yield from readers[file.suffix.lower()](file)


def prompt_of(row: Row) -> str:
    """Return a row's prompt, stripped; empty where the cell is. UserError for a field of no text."""
    where, fields = row
    name = column(fields, COLUMNS)
    if name is None:
        raise _no_prompts(fields, where)
    value = fields[name]
    text = value[0] if isinstance(value, list | tuple) and len(value) == 1 else value
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: field {name!r} is {str(value)[:60]!r}; a prompt is text")
    return (text or "").strip()


def category_of(row: Row, names: Collection[str]) -> str:
    """Return the category in the first such field, several ones joined by " + "; empty if there is none."""
    name = column(row[1], names)
    value = row[1][name] if name is not None else None
    if isinstance(value, list | tuple):
        return " + ".join(str(one).strip() for one in value)
    return "" if value is None else str(value).strip()


def column(fields: Collection[str], names: Collection[str]) -> str | None:
    """Return the first of ``names`` that is among the fields, in any case, as it is written there."""
    lower = {field.lower(): field for field in reversed(list(fields))}
    return next((lower[name] for name in names if name in lower), None)


def source_of(row: Row) -> str | None:
    """Return the field of the source image that the prompt is about, the first of ``SOURCES`` or else one
    that is named like them and holds a file; None where there is none.

    Raises:
        UserError: the only such field holds a video or a mask.
    """
    where, fields = row
    found = source_columns(fields, rivals=False)
    image = next((name for name in found if not holds_no_image(name, fields)), None)
    unused = [name for name in found if fields[name]] if image is None else []
    if unused:
        raise UserError(
            f"{where}: field {unused[0]!r} holds a video or a mask beside the prompt; allowed: one source "
            "image, or a list without that field"
        )
    return image


def sourced(row: Row, folder: Path) -> str:
    """Return a row's prompt, a ``SourcedPrompt`` where it is about an image; paths are relative to
    ``folder``.

    Raises:
        UserError: a prompt or a source of another kind.
    """
    where, fields = row
    text, name = prompt_of(row), source_of(row)
    if name is None:
        return text
    reference = Opener(str(folder), "")(fields[name], f"{where}, field {name!r}")
    return text if reference is None else SourcedPrompt(text, reference.file)


def _no_prompts(names: Collection[str], place: str) -> UserError:
    return UserError(
        f"{place}: no prompts; found {', '.join(names) or 'nothing'}; needed one of {', '.join(COLUMNS)}"
    )


def _lines(file: Path) -> Iterator[Row]:
    return ((where, {"prompt": line}) for where, line in text_lines(file))


def _json(file: Path) -> Iterator[Row]:
    return json_rows(file, texts=True, needed='{"prompt": ...}, or a text')


def _table(file: Path) -> Iterator[Row]:
    table = Table(str(file))
    names = [name for name in csv_columns(table) if name]
    if column(names, COLUMNS) is None:
        raise _no_prompts(names, str(file))
    yield from csv_rows(table)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        names = parquet.schema_arrow.names
        found = column(names, COLUMNS)
        if found is None:
            raise _no_prompts(names, str(file))
        wanted = {found, *AXES, column(names, CATEGORIES), *filter(names_a_source, names)}
        rows = parquet.read(columns=[name for name in names if name in wanted]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from error
    for number, row in enumerate(rows):
        text = row[found]
        yield f"{file.name} row {number}", row | {found: None if text is None else str(text)}
