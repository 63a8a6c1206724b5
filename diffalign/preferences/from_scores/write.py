"""Write comparisons to files for ``diffalign train --data.path``.

Scores of ranked lists are written as gains in [0, 1], which list methods need (RankDPO's weight is 2^gain).
Combined scores outside of that range are mapped to it linearly by the lowest and the highest of the file,
which preserves orders and ratios of differences.

``.parquet`` embeds the images: pairs in Pick-a-Pic's schema (``caption, jpg_0, jpg_1, label_0, label_1``,
with the images' digests as uids), ranked lists as ``prompt, images, scores``. ``.jsonl`` has paths: ``prompt,
images, scores``, or ``videos`` for videos; paths below the file's folder are relative. Both have the column
``rewards``: for each image, the scores that it was chosen by.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.preferences.from_scores.candidates import MediaStore, Stored
from diffalign.preferences.from_scores.make import Comparisons, Group
from diffalign.utils.files import open_atomic

_ROWS = 64  # rows of parquet in memory at once


def write(comparisons: Comparisons, path: Path, store: MediaStore) -> None:
    """Write the comparisons atomically; ``store`` holds the embedded images.

    Raises:
        UserError: no comparisons; videos to parquet or embedded images to jsonl; another suffix.
    """
    if not comparisons.groups:
        raise UserError(f"nothing to write to {path}: {comparisons.text.replace(chr(10), '; ')}")
    check(comparisons, path)
    gain = gains(comparisons.groups) if comparisons.lists else float
    if path.suffix == ".parquet":
        _write_parquet(comparisons, path, store, gain)
        return
    with open_atomic(path) as file:
        for group in comparisons.groups:
            file.write((json.dumps(_line(group, path.parent, gain), ensure_ascii=False) + "\n").encode())


def gains(groups: Sequence[Group]) -> Callable[[float], float]:
    """Return the map from scores of lists to gains in [0, 1]; the identity if they are in that range."""
    scores = [label for group in groups for label in group.comparison.labels]
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 1:
        return float
    return lambda score: (score - low) / (high - low) if high > low else 0.5


def check(comparisons: Comparisons, path: Path) -> None:
    """Raise a UserError if a file of this suffix cannot hold the comparisons."""
    first = comparisons.groups[0].rivals[0]
    if path.suffix == ".parquet" and first.is_video:
        raise UserError(f"cannot write {path}: videos are not embedded; allowed: a name that ends in .jsonl")
    if path.suffix == ".jsonl" and isinstance(first.media, Stored):
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
        "videos" if first.is_video else "images": [_named(rival.media, folder) for rival in group.rivals],
        "scores": [gain(label) for label in group.comparison.labels],
        "rewards": [list(rival.scores) for rival in group.rivals],
    }


def _named(media: Path | Stored, folder: Path) -> str:
    """Return a file's path: relative to ``folder`` if the file is inside it, else absolute."""
    assert isinstance(media, Path)  # `check` tested the first rival, and a source has one kind of media
    place, root = media.resolve(), folder.resolve()
    return str(place.relative_to(root) if place.is_relative_to(root) else place)


def _write_parquet(
    comparisons: Comparisons, path: Path, store: MediaStore, gain: Callable[[float], float]
) -> None:
    import pyarrow
    from pyarrow import parquet

    lists = {"rewards": pyarrow.list_(pyarrow.list_(pyarrow.float64()))}
    if comparisons.lists:
        kinds = {"prompt": pyarrow.string(), "images": pyarrow.list_(pyarrow.binary())}
        kinds |= {"scores": pyarrow.list_(pyarrow.float64())} | lists
    else:
        kinds = {"caption": pyarrow.string(), "jpg_0": pyarrow.binary(), "jpg_1": pyarrow.binary()}
        kinds |= {"label_0": pyarrow.float64(), "label_1": pyarrow.float64(), "has_label": pyarrow.bool_()}
        kinds |= {"are_different": pyarrow.bool_()}
        kinds |= {name: pyarrow.string() for name in ("image_0_uid", "image_1_uid", "best_image_uid")} | lists
    schema = pyarrow.schema(list(kinds.items()))
    groups = iter(comparisons.groups)
    with open_atomic(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while batch := list(islice(groups, _ROWS)):
            rows = [
                _list_row(group, store, gain) if comparisons.lists else _pair_row(group, store)
                for group in batch
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _list_row(group: Group, store: MediaStore, gain: Callable[[float], float]) -> Mapping[str, Any]:
    return {
        "prompt": group.rivals[0].prompt,
        "images": [store.read(rival.media) for rival in group.rivals],
        "scores": [gain(label) for label in group.comparison.labels],
        "rewards": [list(rival.scores) for rival in group.rivals],
    }


def _pair_row(group: Group, store: MediaStore) -> Mapping[str, Any]:
    (first, second), labels = group.rivals, group.comparison.labels
    return {
        "caption": first.prompt,
        "jpg_0": store.read(first.media),
        "jpg_1": store.read(second.media),
        "label_0": labels[0],
        "label_1": labels[1],
        "has_label": True,
        "are_different": first.content != second.content,
        "image_0_uid": first.content,
        "image_1_uid": second.content,
        "best_image_uid": "tie" if labels[0] == labels[1] else (first if labels[0] else second).content,
        "rewards": [list(rival.scores) for rival in group.rivals],
    }
