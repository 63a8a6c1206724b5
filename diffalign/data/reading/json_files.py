"""Json files of rows: json lines, or one document that holds them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffalign.data.reading.files import Table
from diffalign.data.reading.schemas import PROMPTS
from diffalign.data.reading.splits import KNOWN, named_split
from diffalign.errors import UserError, unknown
from diffalign.utils.text import decode, parse_json

Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its fields by name."""

HOLDERS = frozenset({"data", "rows", "examples", "samples", "items", "pairs", "prompts", "annotations"})
"""Names of the list of rows in an object that also holds facts about them."""

NEEDED = '{"prompt": ..., "chosen": ..., "rejected": ...}'


def json_rows(
    file: Path | Table, texts: bool = False, needed: str = NEEDED, split: str | None = None
) -> Iterator[Row]:
    """Yield ("file line n", object) of json lines, or ("file entry n", object) of one document.

    A document is a list of objects, an object of objects (its keys become ``id``), an object of columns of
    one length, an object of lists, each a split, or a single object.

    Args:
        file: the file.
        texts: a list may hold texts, each a prompt.
        needed: an example of an object, for messages.
        split: which of several splits is read, "all" for all; None: there may be one only. One list alone
            is read whatever its name, unless another split than ``train`` is wanted.

    Raises:
        UserError: not UTF-8 text, not json, rows of another kind, or no such split; it names those.
    """
    table = file if isinstance(file, Table) else Table(str(file))
    with table.open() as opened:
        text = decode(opened.read(), table.place)
    for where, entry in _entries(text, table, split):
        if texts and isinstance(entry, str):
            entry = {"prompt": entry}
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {str(entry)[:60]!r}; needed an object such as {needed}")
        yield where, entry


def splits_in(table: Table) -> list[str]:
    """Return the names of the lists of rows in a file that is one object of them; [] for other files."""
    with table.open() as opened:
        text = decode(opened.read(), table.place)
    return list(_lists(text))


def _lists(text: str) -> Mapping[str, list[Any]]:
    """Return the splits of a text that is one object of them; {} for another text."""
    value = _value(text) if text.lstrip()[:1] == "{" and not _is_lines(text) else None
    return _splits(value) if isinstance(value, dict) else {}


def _entries(text: str, table: Table, split: str | None) -> Iterator[tuple[str, Any]]:
    # a list or an object of splits may lie under a name of json lines
    first = text.lstrip()[:1]
    document = first == "[" or (first == "{" and (table.suffix == ".json" or bool(_lists(text))))
    if document and not _is_lines(text):
        entries = _document(text, table, split)
        yield from ((f"{table.name} entry {i}", entry) for i, entry in enumerate(entries))
        return
    lines = text.split("\n")  # not splitlines: json strings may hold other line separators than \n
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{table.name} line {number}"
            yield where, parse_json(line, where)


def _document(text: str, table: Table, split: str | None) -> list[Any]:
    """Return the rows of a file that is one document."""
    value = parse_json(text, table.place)
    if isinstance(value, list):
        return value
    if value and all(isinstance(one, dict) for one in value.values()):
        return [{"id": key, **one} for key, one in value.items()]
    if splits := _splits(value):
        return _of_split(splits, table.place, split)
    lengths = {len(one) if isinstance(one, list) else -1 for one in value.values()}
    if len(lengths) == 1 and not lengths & {-1, 0, 1}:  # columns, as ``DataFrame.to_dict("list")`` gives
        return [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    return [value]


def _splits(value: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the lists of rows of an object that is no row itself, by name; {} for a row or columns."""
    lists = {
        name: one
        for name, one in value.items()
        if isinstance(one, list) and all(isinstance(row, dict | str) for row in one[:1])
    }
    if not any(lists.values()) or not value.keys().isdisjoint(PROMPTS):
        return {}
    known = {word for words in KNOWN.values() for word in words} | HOLDERS
    if all(name.lower() in known for name in lists):
        return lists  # facts may stand beside them
    tables = all(isinstance(row, dict) for one in lists.values() for row in one[:1])
    return lists if len(lists) == len(value) and (tables or len(lists) == 1) else {}


def _of_split(splits: Mapping[str, list[Any]], place: str, split: str | None) -> list[Any]:
    if split == "all":
        return [row for rows in splits.values() for row in rows]
    if split is not None:
        same = [name for name in splits if named_split(name) == named_split(split)]
        if same:
            return splits[split if split in same else same[0]]
    if len(splits) == 1 and split in (None, "train"):
        return next(iter(splits.values()))
    if split is None:
        raise UserError(
            f"{place}: holds several lists of rows, {', '.join(splits)}; allowed: a file of one of them"
        )
    raise unknown(f"split (data.split) of {place!r}", split, [*splits, "all"])


def _is_lines(text: str) -> bool:
    """Whether there are several lines, the first of which is json by itself."""
    first, _, rest = text.strip().partition("\n")
    return bool(rest) and _value(first) is not None


def _value(text: str) -> Any:
    """Return the value of a json text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
