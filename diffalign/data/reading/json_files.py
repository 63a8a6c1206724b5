"""Json files of rows: json lines, or one document that holds them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.data.reading.files import Table
from diffalign.errors import UserError
from diffalign.utils.text import decode, parse_json

Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its fields by name."""

NEEDED = '{"prompt": ..., "chosen": ..., "rejected": ...}'


def json_rows(file: Path | Table, texts: bool = False, needed: str = NEEDED) -> Iterator[Row]:
    """Yield ("file line n", object) of json lines, or ("file entry n", object) of one document.

    A document is a list of objects, an object of objects (its keys become ``id``), an object with one list,
    or a single object. With ``texts`` a list may hold texts, each a prompt; ``needed`` is an example.

    Raises:
        UserError: not UTF-8 text, not json, or rows of another kind.
    """
    table = file if isinstance(file, Table) else Table(str(file))
    with table.open() as opened:
        text = decode(opened.read(), table.place)
    for where, entry in _entries(text, table):
        if texts and isinstance(entry, str):
            entry = {"prompt": entry}
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {str(entry)[:60]!r}; needed an object such as {needed}")
        yield where, entry


def _entries(text: str, table: Table) -> Iterator[tuple[str, Any]]:
    listed = text.lstrip()[:1] == "[" and not _is_lines(text)  # a list under a name of json lines
    document = _document(text, table) if table.suffix == ".json" or listed else None
    if document is not None:
        yield from ((f"{table.name} entry {i}", entry) for i, entry in enumerate(document))
        return
    lines = text.split("\n")  # not splitlines: json strings may hold other line separators than \n
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{table.name} line {number}"
            yield where, parse_json(line, where)


def _document(text: str, table: Table) -> list[Any] | None:
    """Return the rows of a file that is one document; None where it is json lines."""
    first = text.lstrip()[:1]
    if first not in ("[", "{") or (first == "{" and _is_lines(text)):
        return None
    value = parse_json(text, table.place)
    if isinstance(value, list):
        return value
    lists = [
        one for one in value.values() if isinstance(one, list) and one and isinstance(one[0], dict | str)
    ]
    if value and all(isinstance(one, dict) for one in value.values()):
        return [{"id": key, **one} for key, one in value.items()]
    return lists[0] if len(lists) == 1 and len(value) == 1 else [value]


def _is_lines(text: str) -> bool:
    """Whether there are several lines, the first of which is json by itself."""
    first, _, rest = text.strip().partition("\n")
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return bool(rest)
