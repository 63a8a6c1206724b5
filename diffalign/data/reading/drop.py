"""Removal of rows from a training set, which a text file names, one a line (``data.drop``).

Rows are named as in messages, such as ``pairs.parquet row 17``; ``diffalign displacement`` writes such a
file. Lines that are empty or begin with ``#`` are ignored.
"""

from pathlib import Path

from diffalign.data.encoding.encoded import EncodedSet
from diffalign.errors import UserError


def leave_out(encoded: EncodedSet, file: str | None) -> EncodedSet:
    """Return ``encoded`` without the rows that ``file`` names; None leaves nothing out.

    Raises:
        UserError: no such file, none of its rows is in the set, or nothing would be left.
    """
    if file is None:
        return encoded
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.drop={file!r}: cannot be read ({error})") from error
    names = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    kept = [i for i, record in enumerate(encoded) if record.where not in names]
    if names and len(kept) == len(encoded):
        example = encoded[0].where if len(encoded) else "nothing"
        raise UserError(
            f"data.drop={file!r}: none of its {len(names)} rows is in the training set, whose rows are named "
            f"like {example!r}"
        )
    if not kept:
        raise UserError(f"data.drop={file!r} leaves no row of {len(encoded)} to train on")
    return encoded.subset(kept)
