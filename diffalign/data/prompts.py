"""Prompt files: text lines, json lines, tables, and the built-in lists and embedded sets."""

import csv
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from diffalign.data.prompt_lists import LISTS
from diffalign.data.tables import json_rows
from diffalign.errors import UserError, unknown

COLUMNS = ("prompt", "caption", "text")
"""Names of the prompt's column or field, in any case, the first that is there."""

SPLITS = ("train", "validation", "test")
FORMATS = ".txt, .jsonl, .json, .tsv, .csv, .parquet"


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """The prompts of a file in their order, without empty ones; at most ``limit``.

    ``.txt`` has one a line; ``.jsonl`` and ``.json`` objects with a field ``prompt``, ``caption`` or
    ``text``; ``.tsv``, ``.csv`` and ``.parquet`` a column of such a name (PartiPrompts' ``Prompt`` too);
    ``tiny:train``, ``tiny:validation`` and ``tiny:test`` are the drawn scenes', ``tiny:motions/train`` and so
    on the moving shapes'; ``animals`` and ``activities`` are lists of our own (`prompt_lists`). Raises
    UserError for a missing, unreadable or empty file, naming what was found and what is needed.
    """
    if path.startswith("tiny:"):
        return _tiny(path.removeprefix("tiny:"), limit)
    if path in LISTS:
        return LISTS[path]()[:limit]
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"prompt file {path!r}: no such file; "
            f"allowed: {FORMATS}, or tiny:train, tiny:validation, tiny:test, tiny:motions/train (and so on), "
            f"{', '.join(LISTS)}"
        )
    readers = {
        ".txt": _lines, ".jsonl": _json, ".json": _json, ".tsv": _table, ".csv": _table, ".parquet": _parquet,
    }  # fmt: skip
    if file.suffix.lower() not in readers:
        raise UserError(
            f"prompt file {path!r}: cannot read {file.suffix or 'a file without suffix'}; allowed: {FORMATS}"
        )
    try:
        stripped = (prompt.strip() for prompt in readers[file.suffix.lower()](file))
        prompts = list(islice((prompt for prompt in stripped if prompt), limit))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not prompts:
        raise UserError(f"{file}: no prompts in it")
    return prompts


def _tiny(name: str, limit: int | None) -> list[str]:
    from diffalign import tiny

    of = {split: tiny.prompts for split in SPLITS}
    of |= {f"motions/{split}": tiny.motion_prompts for split in SPLITS}
    if name not in of:
        raise unknown("embedded prompts", f"tiny:{name}", [f"tiny:{known}" for known in of])
    return of[name](name.removeprefix("motions/"))[:limit]


def _lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from lines


def _json(file: Path) -> Iterator[str]:
    for where, row in json_rows(file):
        name = _column(row, where)
        if not isinstance(row[name], str):
            raise UserError(f"{where}: field {name!r} is {str(row[name])[:60]!r}; a prompt is text")
        yield row[name]


def _table(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        tabs = file.suffix.lower() == ".tsv"
        # a tab-separated file is not quoted: prompts contain lone quotation marks
        rows = (
            csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.DictReader(lines)
        )
        name = _column(rows.fieldnames or [], str(file))
        yield from (row[name] or "" for row in rows)


def _parquet(file: Path) -> Iterable[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        name = _column(parquet.schema_arrow.names, str(file))
        return [
            str(value) for value in parquet.read(columns=[name]).column(name).to_pylist() if value is not None
        ]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not readable as parquet ({str(error).splitlines()[0]})") from error


def _column(names: Collection[str], place: str) -> str:
    lower = {name.lower(): name for name in reversed(list(names))}
    found = next((lower[name] for name in COLUMNS if name in lower), None)
    if found is None:
        raise UserError(
            f"{place}: no prompts; found {', '.join(names) or 'nothing'}; needed one of {', '.join(COLUMNS)}"
        )
    return found
