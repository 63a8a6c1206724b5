"""Splits of a folder's files by their names, as in the hub's loader.

``train-00000-of-00004.parquet`` is of the split ``train``; otherwise a word of a known split in the path
below the folder, between anything but letters and digits, names it.
"""

import re
from collections.abc import Sequence
from pathlib import PurePath

from diffalign.data.reading.files import Table
from diffalign.errors import UserError, unknown

KNOWN = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"^(\w[\w.]*?)-\d+-of-\d+")


def split_of(name: str) -> str | None:
    """Return the split of a file by its path below the folder, None if it names none."""
    if shard := _SHARD.match(PurePath(name).name):
        return named_split(shard.group(1))
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((split for word in reversed(words) for split, known in KNOWN.items() if word in known), None)


def named_split(name: str) -> str:
    """Return the split that a word names: "val" is ``validation``; another word is its own name."""
    return next((split for split, words in KNOWN.items() if name.lower() in words), name)


def of_split(tables: Sequence[Table], folder: str, split: str) -> tuple[list[Table], list[str]]:
    """Return the tables of a split and a note on those without a split; "all" takes every table.

    A folder whose files name no split has one split, ``train``.

    Raises:
        UserError: the folder has no such split; it names those that there are.
    """
    if split == "all":
        return list(tables), []
    by_split: dict[str | None, list[Table]] = {}
    for table in tables:
        below = table.place[len(folder) :] if table.place.startswith(folder) else table.place
        by_split.setdefault(split_of(below), []).append(table)
    named = [name for name in by_split if name is not None]
    if not named:
        if split != "train":
            raise UserError(
                f"data.split is {split!r}, but the files of {folder!r} have no splits; allowed: train, all"
            )
        return list(tables), []
    wanted = named_split(split)
    if wanted not in by_split:
        raise unknown(f"split (data.split) of {folder!r}", split, [*named, "all"])
    left = by_split.get(None, [])
    notes = (
        [f"{len(left)} files of no split left out: {some([table.name for table in left])}"] if left else []
    )
    return by_split[wanted], notes


def some(names: Sequence[str]) -> str:
    """Return the first five names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
