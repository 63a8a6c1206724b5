"""Csv and tsv files of rows."""

import csv
import io
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

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
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    if table.suffix == ".tsv" and not _is_quoted(text):
        quoting = csv.QUOTE_NONE
    reader = csv.DictReader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        skipinitialspace=spaced,
        quoting=quoting,
        strict=True,
    )
    with _named_errors(reader, table):
        names = reader.fieldnames or ()
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{table.place} line 1: column {twice[0]!r} twice; allowed: a name once")
    return reader


@contextmanager
def _named_errors(reader: "csv.DictReader[str]", table: Table) -> Iterator[None]:
    """Turn errors of csv into one that names the first line of the row at fault."""
    line = reader.line_num + 1
    try:
        yield
    except csv.Error as error:
        raise UserError(
            f"{table.place} line {line}: not readable as csv ({error}); a cell that begins with a quotation "
            "mark ends with one, and those within it are doubled"
        ) from error


def _is_quoted(text: str) -> bool:
    """Return whether tab-separated cells are quoted: every mark that begins a cell has its end.

    Tables of prompts are also written without quoting, where a lone mark would take in the lines after it.
    """
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True):
            pass
    except csv.Error:
        return False
    return True


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
    return dict.fromkeys(_csv_reader(table).fieldnames or (), "")


def csv_rows(table: Table) -> Rows:
    """Yield the rows of a csv or tsv file; UserError for what is none.

    Quotation marks enclose cells; in a tab-separated file they are text unless each of them has its end. In
    a file of one column a comma needs no quotation marks, since there is nothing that it could divide.
    """
    csv.field_size_limit(CELL)
    reader = _csv_reader(table)
    for number in itertools.count():
        with _named_errors(reader, table):
            row = next(reader, None)
        if row is None:
            return
        where = f"{table.name} row {number}"
        yield where, _whole(row, where, reader.reader.dialect.delimiter)


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
