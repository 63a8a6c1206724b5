"""Csv and tsv files of rows."""

import csv
import io
from collections.abc import Iterator, Mapping
from typing import Any

from diffalign.data.reading.files import Table
from diffalign.errors import UserError
from diffalign.utils.text import decode

CELL = 2**24
"""Characters of a cell, at most."""

Rows = Iterator[tuple[str, Mapping[str, Any]]]
"""("file row n", cells by column)."""


def _csv_reader(table: Table) -> "csv.DictReader[str]":
    with table.open() as file:
        text = decode(file.read(), table.place)
    delimiter, spaced = _dialect(text, table)
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=spaced)
    names = reader.fieldnames or ()
    if twice := sorted({name for name in names if names.count(name) > 1}):
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


def csv_columns(table: Table) -> dict[str, str]:
    """Return an empty cell for each column of a file without rows."""
    try:
        return dict.fromkeys(_csv_reader(table).fieldnames or (), "")
    except csv.Error as error:
        raise UserError(f"{table.place}: not readable as csv ({error})") from error


def csv_rows(table: Table) -> Rows:
    """Yield the rows of a csv or tsv file; UserError for what is none."""
    csv.field_size_limit(CELL)
    try:
        for number, row in enumerate(_csv_reader(table)):
            if None in row:
                raise UserError(
                    f"{table.name} row {number}: more cells than columns; quote cells with commas"
                )
            yield f"{table.name} row {number}", row
    except csv.Error as error:
        raise UserError(f"{table.place}: not readable as csv ({error})") from error
