"""Comparisons as files that ``diffalign train --data.path`` reads as they are.

The scores of ranked lists are gains in [0, 1], as methods that learn from lists need them (RankDPO's weight
is 2^gain): combined scores beyond that range are mapped to it by the lowest and the highest of the file. That
keeps every order and the ratio of differences. ``.parquet`` holds the images: pairs in Pick-a-Pic's schema
(``caption, jpg_0, jpg_1, label_0, label_1``, with the digests of the images as their uids), ranked lists as
``prompt, images, scores``. ``.jsonl`` names files: ``prompt, images, scores``, or ``videos``; paths are
relative to it where they lie below its folder. Both have ``rewards``, for each image the scores that it was
chosen by.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.preferences.from_scores.candidates import Kept, Shelf
from diffalign.preferences.from_scores.make import Group, Made
from diffalign.utils.files import open_atomic

_ROWS = 64  # of parquet, held and written at once


def write(made: Made, path: Path, shelf: Shelf) -> None:
    """Write the comparisons, or nothing.

    Raises:
        UserError: nothing was made; videos in parquet or embedded images in jsonl; another suffix.
    """
    if not made.groups:
        raise UserError(f"nothing to write to {path}: {made.text.replace(chr(10), '; ')}")
    check(made, path)
    gain = gains(made.groups) if made.lists else float
    if path.suffix == ".parquet":
        _write_parquet(made, path, shelf, gain)
        return
    with open_atomic(path) as file:
        for group in made.groups:
            file.write((json.dumps(_line(group, path.parent, gain), ensure_ascii=False) + "\n").encode())


def gains(groups: Sequence[Group]) -> Callable[[float], float]:
    """Return what maps the scores of lists to gains in [0, 1]; the identity where they are in that range."""
    scores = [label for group in groups for label in group.comparison.labels]
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 1:
        return float
    return lambda score: (score - low) / (high - low) if high > low else 0.5


def check(made: Made, path: Path) -> None:
    """UserError for what a file of this suffix cannot hold."""
    first = made.groups[0].rivals[0]
    if path.suffix == ".parquet" and first.is_video:
        raise UserError(f"cannot write {path}: videos are not embedded; allowed: a name that ends in .jsonl")
    if path.suffix == ".jsonl" and isinstance(first.media, Kept):
        raise UserError(
            f"cannot write {path}: the images lie inside a parquet file and have no names; allowed: a name "
            "that ends in .parquet"
        )
    if path.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"cannot write {path}: the name must end in .parquet or .jsonl")


def _line(group: Group, folder: Path, gain: Callable[[float], float]) -> dict[str, Any]:
    first = group.rivals[0]
    return {
        "prompt": first.prompt,
        "videos" if first.is_video else "images": [_named(one.media, folder) for one in group.rivals],
        "scores": [gain(label) for label in group.comparison.labels],
        "rewards": [list(one.scores) for one in group.rivals],
    }


def _named(media: Path | Kept, folder: Path) -> str:
    """Return a file's path, relative to a folder that it is in, else absolute."""
    assert isinstance(media, Path)  # `check` has seen the first, and a source is of one kind
    place, root = media.resolve(), folder.resolve()
    return str(place.relative_to(root) if place.is_relative_to(root) else place)


def _write_parquet(made: Made, path: Path, shelf: Shelf, gain: Callable[[float], float]) -> None:
    import pyarrow
    from pyarrow import parquet

    lists = {"rewards": pyarrow.list_(pyarrow.list_(pyarrow.float64()))}
    if made.lists:
        kinds = {"prompt": pyarrow.string(), "images": pyarrow.list_(pyarrow.binary())}
        kinds |= {"scores": pyarrow.list_(pyarrow.float64())} | lists
    else:
        kinds = {"caption": pyarrow.string(), "jpg_0": pyarrow.binary(), "jpg_1": pyarrow.binary()}
        kinds |= {"label_0": pyarrow.float64(), "label_1": pyarrow.float64(), "has_label": pyarrow.bool_()}
        kinds |= {"are_different": pyarrow.bool_()}
        kinds |= {name: pyarrow.string() for name in ("image_0_uid", "image_1_uid", "best_image_uid")} | lists
    schema = pyarrow.schema(list(kinds.items()))
    groups = iter(made.groups)
    with open_atomic(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while some := list(islice(groups, _ROWS)):
            rows = [_listed(group, shelf, gain) if made.lists else _paired(group, shelf) for group in some]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _listed(group: Group, shelf: Shelf, gain: Callable[[float], float]) -> Mapping[str, Any]:
    return {
        "prompt": group.rivals[0].prompt,
        "images": [shelf.read(one.media) for one in group.rivals],
        "scores": [gain(label) for label in group.comparison.labels],
        "rewards": [list(one.scores) for one in group.rivals],
    }


def _paired(group: Group, shelf: Shelf) -> Mapping[str, Any]:
    (first, second), labels = group.rivals, group.comparison.labels
    return {
        "caption": first.prompt,
        "jpg_0": shelf.read(first.media),
        "jpg_1": shelf.read(second.media),
        "label_0": labels[0],
        "label_1": labels[1],
        "has_label": True,
        "are_different": first.content != second.content,
        "image_0_uid": first.content,
        "image_1_uid": second.content,
        "best_image_uid": "tie" if labels[0] == labels[1] else (first if labels[0] else second).content,
        "rewards": [list(one.scores) for one in group.rivals],
    }
