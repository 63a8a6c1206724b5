"""Csv and tsv files of rows."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from diffalign.data.reading.files import Table
from diffalign.errors import UserError
from diffalign.utils.text import decode

CELL = 2**24
"""Characters of a cell, at most."""

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""("file row n", cells by column)."""


def _csv_reader(table: Table, quoted: bool) -> "csv.DictReader[str]":
    with table.open() as file:
        text = decode(file.read(), table.place)
    delimiter, spaced = _dialect(text, table)
    lines = io.StringIO(text, newline="")
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=spaced, quoting=quoting)
    names = reader.fieldnames or ()
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{table.place} line 1: column {twice[0]!r} twice; allowed: a name once")
    return reader


def _dialect(text: str, table: Table) -> tuple[str, bool]:
    """Return the delimiter, and whether it is followed by spaces that belong to no cell, by the first line.

    A file is split at tabs where its name says so, at commas where its first line has any; spreadsheets of
    several languages save semicolons.
    """
    if table.suffix == ".tsv":
        return "\t", False
    first = text.lstrip().partition("\n")[0]
    delimiter = next((sign for sign in ",;\t" if sign in first), ",")
    return delimiter, f"{delimiter} " in first


def csv_columns(table: Table, quoted: bool = True) -> dict[str, str]:
    """Return an empty cell for each column of a file without rows; ``quoted`` is as for ``csv_rows``."""
    try:
        return dict.fromkeys(_csv_reader(table, quoted).fieldnames or (), "")
    except csv.Error as error:
        raise UserError(f"{table.place}: not readable as csv ({error})") from error


def csv_rows(table: Table, quoted: bool = True) -> Rows:
    """Yield the rows of a csv or tsv file; UserError for what is none.

    Args:
        table: the file.
        quoted: quotation marks enclose cells; False: they are text.

    In a file of one column a comma needs no quotation marks, since there is nothing that it could divide.
    """
    csv.field_size_limit(CELL)
    try:
        reader = _csv_reader(table, quoted)
        for number, row in enumerate(reader):
            where = f"{table.name} row {number}"
            yield where, _whole(row, where, reader.reader.dialect.delimiter)
    except csv.Error as error:
        raise UserError(f"{table.place}: not readable as csv ({error})") from error


def _whole(row: dict[Any, Any], where: str, delimiter: str) -> dict[str, Any]:
    """Return a row without cells that have no column; UserError where such cells hold something."""
    more = row.pop(None, [])
    if len(row) == 1 and more:
        ((name, first),) = row.items()
        return {name: delimiter.join([first, *more])}
    if any(more):
        raise UserError(
            f"{where}: more cells than columns, {', '.join(more)[:60]!r}; quote cells with "
            f"{'tabs' if delimiter == chr(9) else 'commas'}"
        )
    return row
