"""Labels of pairs in intervals of time from a file beside the set (``data.time_labels``).

``diffalign time-labels`` writes it: a line of JSON a pair, which names its row as messages do.
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from diffalign.data.encoding.encoded import EncodedSet
from diffalign.data.encoding.records import SCHEMA
from diffalign.errors import UserError
from diffalign.utils.text import json_lines


def with_time_labels(
    encoded: EncodedSet, file: str | None, tell: Callable[[str], None] | None = None
) -> EncodedSet:
    """Return ``encoded`` with the labels that ``file`` names its rows with; None changes nothing.

    Args:
        encoded: the training set.
        file: ``data.time_labels``.
        tell: gets a line with the number of groups that got labels, and of names that are no row's.

    Raises:
        UserError: a file that cannot be read, lines that are none, or rows of which none is in the set.
    """
    if file is None:
        return encoded
    labels: dict[str, tuple[int, ...]] = {}
    for where, row in json_lines(Path(file), '{"where": ..., "time_labels": [1, -1, 0]}'):
        each = row.get("time_labels")
        named = isinstance(row.get("where"), str)
        if not named or not isinstance(each, list) or any(label not in (1, -1, 0) for label in each):
            raise UserError(f"{where}: allowed: a row's name and a list of 1, -1 and 0")
        labels[row["where"]] = tuple(map(int, each))
    if len({len(each) for each in labels.values()}) > 1:
        raise UserError(f"data.time_labels={file!r}: rows have different numbers of labels")
    if not any(record.where in labels for record in encoded):
        raise UserError(f"data.time_labels={file!r}: none of its {len(labels)} rows is in the training set")
    rows = encoded.records
    if tell:
        there = {*rows.column("where").to_pylist()}
        unknown = sum(where not in there for where in labels)
        others = f"; {unknown} further names are of no row of the training set" if unknown else ""
        tell(f"data.time_labels={file!r}: labels of {len(labels) - unknown} of {len(rows)} groups{others}")
    places, old = rows.column("where").to_pylist(), rows.column("time_labels").to_pylist()
    cells = [labels.get(where, own) for where, own in zip(places, old, strict=True)]
    column = pa.array(cells, SCHEMA.field("time_labels").type)
    return encoded.holding(rows.with_column("time_labels", column), encoded.dense)
