"""One door to every preference format: ``read_preferences(config.data)``.

The format is read off the path: a folder of pairs or likes of image or video files, a parquet file, folder
or glob, json lines, csv, ``tiny:pairs`` and its like (the embedded sets), and what is none of these and looks
like a name is a hub dataset.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.captions.captions import captioned
from diffalign.data.reading.examples import Example, Preferences, Skipped, turn_share
from diffalign.data.reading.folders import is_preference_folder, read_folder
from diffalign.data.reading.rows import read_row, schema_of
from diffalign.data.reading.tables import (
    embedded,
    parquet_files,
    read_csv,
    read_hub,
    read_jsonl,
    read_parquet,
)
from diffalign.errors import UserError, unknown
from diffalign.media.videos import need_av

TINY = 1  # version of the sets that are drawn: part of their fingerprint

READERS: dict[str, Callable[[DataConfig], Preferences]] = {
    "parquet": read_parquet,
    "folder": read_folder,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "hub": read_hub,
}


def read_preferences(config: DataConfig, seed: int = 0) -> Preferences:
    """The preference set that ``config.path`` names.

    Reads no more than the beginning; rows come as it is iterated. ``config.flip_labels`` of the labels, drawn
    by ``seed`` and content, are turned round. Raises UserError for whatever is wrong with the path, the
    format or the settings.
    """
    check_data(config)
    preferences = _read(config)
    view = captioned(config.altered) if config.view == "captions" else None
    if not config.flip_labels and not view:
        return preferences

    def each(example: Example) -> Example | Skipped:
        seen = view(example) if view else example
        return seen if isinstance(seen, Skipped) else turn_share(seen, config.flip_labels, seed)

    mark = preferences.fingerprint
    if mark and view:
        mark = f"{mark} captions {view.fingerprint}"
    if mark and config.flip_labels:
        mark = f"{mark} flip_labels {config.flip_labels} seed {seed}"
    return Preferences(preferences.name, preferences.unfinished, preferences.total, mark, each)


def _read(config: DataConfig) -> Preferences:
    if config.path.startswith("tiny:"):
        return _tiny(config)
    name = detect_format(config.path) if config.format == "auto" else config.format
    if name not in READERS:
        raise unknown("data.format", name, ["auto", *READERS])
    if config.label and name != "csv":
        raise UserError(f"data.label is {config.label!r}, but the set is {name}; it names a column of a csv")
    return READERS[name](config)


def detect_format(path: str) -> str:
    """The format that a path looks like; UserError if there is nothing there and it cannot be a hub name."""
    place = Path(path).expanduser()
    if place.is_dir():
        if is_preference_folder(place):
            return "folder"
        if parquet_files(path):
            return "parquet"
        raise UserError(
            f"data.path {path!r}: a folder without preferences; needed w/ and l/ (or chosen/ "
            f"and rejected/) with equal names, files NAME_w and NAME_l, liked/ and disliked/, or parquet "
            f"files"
        )
    if place.suffix in (".jsonl", ".json"):
        return "jsonl"
    if place.suffix == ".csv":
        return "csv"
    if place.suffix == ".parquet" or any(sign in path for sign in "*?["):
        return "parquet"
    if place.exists():
        raise UserError(
            f"data.path {path!r}: cannot tell the format of {place.suffix or 'this'} files; "
            f"allowed: .parquet, .jsonl, .json, .csv, folders"
        )
    is_path = path.startswith(("/", ".", "~")) or place.suffix in (".tsv", ".txt", ".zip")
    if is_path or path.count("/") != 1:
        raise UserError(f"data.path {path!r}: no such file or folder (a hub dataset is written owner/name)")
    return "hub"


def check_data(config: DataConfig) -> None:
    """UserError for a setting of the data section that is out of range, naming it and what is allowed."""
    if not config.path:
        raise UserError(
            "data.path is empty; "
            "give a parquet file or glob, a folder, a jsonl or csv file, a hub dataset, or tiny:pairs"
        )
    rules: list[tuple[str, bool, str]] = [
        ("resolution", config.resolution >= 8 and config.resolution % 8 == 0, "a multiple of 8"),
        ("limit", config.limit is None or config.limit >= 1, "at least 1, or null for all"),
        ("prompt_dropout", 0 <= config.prompt_dropout <= 1, "a share from 0 to 1"),
        ("flip_labels", 0 <= config.flip_labels <= 1, "a share from 0 to 1"),
        ("holdout", 0 <= config.holdout < 1, "a share from 0 to below 1"),
        ("max_holdout", config.max_holdout >= 0, "0 or more"),
        ("cache_batch_size", config.cache_batch_size >= 1, "at least 1"),
        ("workers", config.workers >= 0, "0 or more"),
    ]
    rules += _of_videos(config)
    if config.buckets:
        step = config.bucket_step
        allowed = f"a multiple of 8 from 8 to the resolution ({config.resolution})"
        rules.append(("bucket_step", step >= 8 and step % 8 == 0 and step <= config.resolution, allowed))
    for name, holds, allowed in rules:
        if not holds:
            raise UserError(f"data.{name} is {getattr(config, name)}; allowed: {allowed}")


def _of_videos(config: DataConfig) -> list[tuple[str, bool, str]]:
    """Rules of sizes in time and of explicit ones."""
    sides = (config.height, config.width)
    for name, side, other in (("height", *sides), ("width", *reversed(sides))):
        if side is None and other is not None:
            raise UserError(f"data.{name} is null, but its fellow is {other}; give both, or data.resolution")
    if config.height is not None and config.buckets:
        raise UserError(
            f"data.height is {config.height} with data.buckets, whose sizes follow from data.resolution; "
            "allowed: one of them"
        )
    if config.frames is not None:
        need_av()
    sized = [
        (name, side is None or (side >= 8 and side % 8 == 0), "a multiple of 8, or null")
        for name, side in zip(("height", "width"), sides, strict=True)
    ]
    return [
        *sized,
        ("frames", config.frames is None or config.frames >= 1, "at least 1, or null for images"),
        ("fps", config.fps is None or config.frames is not None, "null without data.frames"),
        ("fps", config.fps is None or config.fps > 0, "more than 0, or null for that of the first video"),
        ("segment_seconds", config.segment_seconds > 0, "more than 0"),
    ]


def _tiny(config: DataConfig) -> Preferences:
    """The pairs that ship with the package, or a set that is drawn as it is read."""
    from diffalign.tiny import pairs_path
    from diffalign.tiny.sets import GROUPS, SETS, rows

    name = config.path.removeprefix("tiny:")
    if name == "pairs":
        return read_parquet(replace(config, path=str(pairs_path())))
    if name not in SETS:
        raise unknown("embedded data set", config.path, ["tiny:pairs", *(f"tiny:{name}" for name in SETS)])
    total = min(GROUPS, config.limit or GROUPS)
    image = embedded(Path())

    def examples() -> Iterator[Example | Skipped]:
        for number, row in enumerate(islice(rows(name), total)):
            where = f"{config.path} row {number}"
            yield read_row(row, schema_of(row, where), where, image)

    return Preferences(config.path, examples, total, f"{config.path} {TINY}")
