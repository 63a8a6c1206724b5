"""Layouts of published prompt sets that are not plain lists: a row of (place, fields) for each prompt."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.prompts.prompt_files import COLUMNS, Row, column, file_rows
from diffalign.errors import UserError
from diffalign.utils.text import parse_json

_FIELDS = ("prompt", "prompt_en", *COLUMNS)


def any_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a table or of json: lists of texts or objects, objects by id, json lines.

    The field ``prompt_en`` (OneIG, UniGenBench, VBench) is read as ``prompt``.

    Raises:
        UserError: another layout.
    """
    rows = _json_rows(file) if file.suffix.lower() == ".json" else file_rows(file)
    for where, fields in rows:
        name = column(fields, _FIELDS)
        yield where, fields if name is None else {**fields, "prompt": fields[name]}


def unique_rows(file: Path) -> Iterator[Row]:
    """Yield the first row of each prompt of ``any_rows``, for sets with several rows a prompt."""
    seen: set[Any] = set()
    for where, fields in any_rows(file):
        prompt = fields.get("prompt")
        if prompt not in seen:
            seen.add(prompt)
            yield where, fields


def dpg_rows(place: Path) -> Iterator[Row]:
    """Yield DPG-Bench's prompts: of its csv, a row a proposition of an item, or of its folder of texts."""
    if place.is_dir():
        yield from _texts(place, "*.txt", whole=True)
    else:
        yield from unique_rows(place)


def compbench_rows(place: Path) -> Iterator[Row]:
    """Yield T2I-CompBench's prompts, a line each; a file's name says their category: ``color_val.txt``."""
    if place.is_dir():
        yield from _texts(place, "*_val.txt", whole=False)
    else:
        yield from _lines(place)


def _texts(folder: Path, pattern: str, whole: bool) -> Iterator[Row]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: no {pattern} in it; needed: the prompts' texts")
    for file in files:
        if whole:
            yield file.name, {"prompt": " ".join(_read(file).split())}
        else:
            yield from _lines(file)


def _lines(file: Path) -> Iterator[Row]:
    category = file.stem.removesuffix("_val").removesuffix("_train")
    for number, line in enumerate(_read(file).split("\n"), 1):
        yield f"{file.name} line {number}", {"prompt": line.strip(), "category": category}


def _json_rows(file: Path) -> Iterator[Row]:
    data = parse_json(_read(file), str(file))
    if isinstance(data, Mapping):
        entries = [(f"{file.name} entry {name!r}", entry) for name, entry in data.items()]
    elif isinstance(data, list):
        entries = [(f"{file.name} entry {number}", entry) for number, entry in enumerate(data)]
    else:
        raise UserError(f"{file}: {str(data)[:60]!r}; allowed: a list of texts or objects, or objects by id")
    for where, entry in entries:
        if isinstance(entry, str):
            yield where, {"prompt": entry}
        elif isinstance(entry, Mapping):
            yield where, entry
        else:
            raise UserError(f"{where}: {str(entry)[:60]!r}; allowed: a text, or an object with a prompt")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
