"""Labels of pairs in intervals of time from a file beside the set (``data.time_labels``).

``diffalign time-labels`` writes it: a line of JSON a pair, which names its row as messages do.
"""

from dataclasses import replace
from pathlib import Path

from diffalign.data.encoding.encoded import EncodedSet
from diffalign.errors import UserError
from diffalign.utils.text import json_lines


def with_time_labels(encoded: EncodedSet, file: str | None) -> EncodedSet:
    """Return ``encoded`` with the labels that ``file`` names its rows with; None changes nothing.

    Raises:
        UserError: a file that cannot be read, lines that are none, or rows of which none is in the set.
    """
    if file is None:
        return encoded
    labels: dict[str, tuple[int, ...]] = {}
    for where, row in json_lines(Path(file), '{"where": ..., "time_labels": [1, -1, 0]}'):
        each = row.get("time_labels")
        if not isinstance(row.get("where"), str) or not isinstance(each, list) or set(each) - {1, -1, 0}:
            raise UserError(f"{where}: allowed: a row's name and a list of 1, -1 and 0")
        labels[row["where"]] = tuple(each)
    if len({len(each) for each in labels.values()}) > 1:
        raise UserError(f"data.time_labels={file!r}: rows have different numbers of labels")
    known = [record for record in encoded if record.where in labels]
    if not known:
        raise UserError(f"data.time_labels={file!r}: none of its {len(labels)} rows is in the training set")
    records = (
        replace(record, time_labels=labels[record.where]) if record.where in labels else record
        for record in encoded
    )
    return encoded.holding(records, encoded.dense)
