"""Removal of rows from a training set, which a text file names, one a line (``data.drop``).

Rows are named as in messages, such as ``pairs.parquet row 17``; ``diffalign displacement`` writes such a
file. Lines that are empty or begin with ``#`` are ignored.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffalign.data.encoding.encoded import EncodedSet
from diffalign.errors import UserError
from diffalign.utils.text import text_lines


def leave_out(encoded: EncodedSet, file: str | None, tell: Callable[[str], None] | None = None) -> EncodedSet:
    """Return ``encoded`` without the rows that ``file`` names; None leaves nothing out.

    Args:
        encoded: the training set.
        file: ``data.drop``.
        tell: gets a line with the number of rows that were left out, and of names that are no row's.

    Raises:
        UserError: no such file, none of its rows is in the set, or nothing would be left.
    """
    if file is None:
        return encoded
    names = rows_in(file)
    places = encoded.records.column("where")
    named = pc.is_in(places, value_set=pa.array(sorted(names), places.type))
    kept = np.flatnonzero(~named.to_numpy()) if len(encoded) else np.zeros(0, np.int64)
    if names and len(kept) == len(encoded):
        example = encoded[0].where if len(encoded) else "nothing"
        raise UserError(
            f"data.drop={file!r}: none of its {len(names)} rows is in the training set, whose rows are named "
            f"like {example!r}"
        )
    if not len(kept):
        raise UserError(f"data.drop={file!r} leaves no row of {len(encoded)} to train on")
    if tell:
        unknown = len(names) - len(pc.unique(places.filter(named)))
        others = f"; {unknown} further names are of no row of the training set" if unknown else ""
        tell(f"data.drop={file!r}: {len(encoded) - len(kept)} of {len(encoded)} groups left out{others}")
    return encoded.subset(kept)


def rows_in(file: str) -> set[str]:
    """Return the rows that a file of ``data.drop`` names; UserError where it cannot be read."""
    try:
        lines = [line.strip() for _, line in text_lines(file)]
    except UserError as error:
        raise UserError(f"data.drop: {error}") from error
    return {line for line in lines if line and not line.startswith("#")}
