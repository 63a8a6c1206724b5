"""Reading of every preference format: ``read_preferences(config.data)``.

The format follows from the path: a folder of pairs or likes of image or video files, a parquet file, folder
or glob, json, csv, webdataset shards, a Hugging Face image folder, a saved dataset, an embedded set such as
``tiny:pairs``, URLs of tables; any other name is a hub dataset.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.captions.captions import captioned
from diffalign.data.encoding.folder import local_copy
from diffalign.data.reading.examples import Example, Preferences, Skipped, turn_share
from diffalign.data.reading.files import Opener, is_remote, tables_of
from diffalign.data.reading.folders import is_preference_folder, read_folder
from diffalign.data.reading.imagefolder import metadata_of, read_imagefolder
from diffalign.data.reading.mix import mixed
from diffalign.data.reading.rows import read_row, schema_of
from diffalign.data.reading.tables import read_csv, read_hub, read_jsonl, read_parquet, read_saved
from diffalign.data.reading.webdataset import read_webdataset
from diffalign.errors import UserError, unknown
from diffalign.media.videos import need_av

TINY = 1  # version of the generated sets: part of their fingerprint

READERS: dict[str, Callable[[DataConfig], Preferences]] = {
    "parquet": read_parquet,
    "folder": read_folder,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "hub": read_hub,
    "webdataset": read_webdataset,
    "saved": read_saved,
    "imagefolder": read_imagefolder,
}
SUFFIXES = {
    ".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset", ".tgz": "webdataset", ".tar.gz": "webdataset",
}  # fmt: skip


def _local(config: DataConfig) -> DataConfig:
    """Return the settings with a local path.

    For an address of one file only that file is copied; files that it names are read from its folder's
    address.
    """
    path = local_copy(config.path)
    if path == config.path or config.root or not Path(path).is_file():
        return replace(config, path=path)
    return replace(config, path=path, root=config.path.rpartition("/")[0])


def read_preferences(config: DataConfig, seed: int = 0) -> Preferences:
    """Return the preference set that ``config.path`` names.

    Only the beginning is read now (of json and csv every row's columns); rows are read during iteration. A
    share ``config.flip_labels`` of the labels, drawn by ``seed`` and content, is flipped.

    Raises:
        UserError: whatever is wrong with the path, the format or the settings.
    """
    check_data(config)
    if config.mix:
        return mixed(config, seed, read_preferences)
    preferences = _read(_local(config))
    view = captioned(config.altered) if config.view == "captions" else None
    settings = (config.votes, config.min_agreement)
    if not config.flip_labels and not view and settings == ("soft", 0.0):
        return preferences

    def each(example: Example) -> Example | Skipped:
        seen = by_votes(example, *settings)
        seen = view(seen) if view and isinstance(seen, Example) else seen
        return seen if isinstance(seen, Skipped) else turn_share(seen, config.flip_labels, seed)

    mark = preferences.fingerprint
    if mark and settings != ("soft", 0.0):
        mark = f"{mark} votes {settings}"
    if mark and view:
        mark = f"{mark} captions {view.fingerprint}"
    if mark and config.flip_labels:
        mark = f"{mark} flip_labels {config.flip_labels} seed {seed}"
    rows, total = preferences.unfinished, preferences.total
    return Preferences(
        preferences.name, rows, total, mark, each=each, schema=preferences.schema, notes=preferences.notes
    )


def by_votes(example: Example, votes: str, min_agreement: float) -> Example | Skipped:
    """Return the example with its votes used as in ``data.votes``, or the reason why it is left out.

    "weight" makes |2 P - 1| of a pair's votes its weight; a tie keeps its weight, since it has no gradient.
    """
    if not example.votes:
        return example
    if max(example.votes) < min_agreement:
        return Skipped(f"the votes agree by {max(example.votes):.2f}", example.where, "undecided")
    if votes == "soft":
        return example
    best = max(example.votes)
    scores = example.scores if example.is_tie else tuple(float(vote == best) for vote in example.votes)
    sure = abs(2 * example.votes[0] - 1) if len(example.votes) == 2 and not example.is_tie else 1.0
    weight = example.weight * sure if votes == "weight" else example.weight
    return replace(example, scores=scores, votes=(), weight=weight)


def _read(config: DataConfig) -> Preferences:
    if config.path.startswith("tiny:"):
        if config.split not in ("train", "all"):
            raise UserError(
                f"data.split is {config.split!r}, but {config.path!r} has no splits; allowed: train, all"
            )
        return _tiny(config)
    name = detect_format(config.path) if config.format == "auto" else config.format
    if name not in READERS:
        raise unknown("data.format", name, ["auto", *READERS])
    if config.label and name == "folder":
        raise UserError(
            f"data.label is {config.label!r}, but the set is a folder of images; it is for tables"
        )
    if config.streaming and name != "hub":
        raise UserError(
            f"data.streaming is true, but the set is {name}, which is read row by row anyhow; it is for hub "
            "datasets; allowed: false"
        )
    if config.config and name != "hub":
        raise UserError(f"data.config is {config.config!r}, but the set is {name}; it is for hub datasets")
    return READERS[name](config)


def detect_format(path: str) -> str:
    """Return the format that a path looks like.

    Raises:
        UserError: the path does not exist and is no hub name, or the folder has no preferences.
    """
    if is_remote(path):
        return _remote_format(path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder_format(path, place)
    if found := _format_of_name(place.name):
        return found
    if any(sign in path for sign in "*?["):
        return "parquet"
    if place.exists():
        raise UserError(
            f"data.path {path!r}: cannot tell the format of {''.join(place.suffixes[-2:]) or 'such'} files; "
            f"allowed: {', '.join(SUFFIXES)}, folders"
        )
    is_path = path.startswith(("/", ".", "~")) or place.suffix in (".txt", ".zip")
    if is_path or path.count("/") != 1:
        raise UserError(f"data.path {path!r}: no such file or folder (a hub dataset is written owner/name)")
    return "hub"


def _format_of_name(name: str) -> str | None:
    """Return the format that the end of a file's name tells, None where it tells none."""
    return next((kind for suffix, kind in SUFFIXES.items() if name.lower().endswith(suffix)), None)


def _format_of_tables(path: str) -> str | None:
    """Return the format of the first kind of tables that a folder has, None where it has none of them."""
    kinds = {".parquet": "parquet", ".tar": "webdataset", ".jsonl": "jsonl", ".csv": "csv"}
    return next((name for suffix, name in kinds.items() if tables_of(path, (suffix,))), None)


def _folder_format(path: str, place: Path) -> str:
    if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
        return "saved"
    if is_preference_folder(place):
        return "folder"
    if metadata_of(place):
        return "imagefolder"
    if found := _format_of_tables(path):
        return found
    if tables_of(path, (".json",)):
        return "jsonl"
    raise UserError(
        f"data.path {path!r}: a folder without preferences; needed w/ and l/ (or chosen/ "
        f"and rejected/, win/ and lose/) with equal names, files NAME_w and NAME_l, liked/ and disliked/, "
        f"metadata.jsonl, or parquet, json, csv or tar files"
    )


def _remote_format(path: str) -> str:
    if found := _format_of_name(path) or _format_of_tables(path):
        return found
    raise UserError(
        f"data.path {path!r}: nothing to read there; allowed: a file or a folder of {', '.join(SUFFIXES)} "
        "(folders of images are read from a local disk)"
    )


def check_data(config: DataConfig) -> None:
    """Check the settings of the data section.

    Raises:
        UserError: one is out of range; it names it and what is allowed.
    """
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
        ("min_agreement", 0 <= config.min_agreement <= 1, "a share from 0 to 1"),
        (
            "max_downloads",
            config.max_downloads is None or config.max_downloads >= 0,
            "0 or more, or null for all",
        ),
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
    """Return the rules of sizes in time and of explicit ones."""
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
    """Return the pairs that are shipped with the package, or a set that is generated as it is read."""
    from diffalign.tiny import pairs_path
    from diffalign.tiny.sets import GROUPS, SETS, rows

    name = config.path.removeprefix("tiny:")
    if name == "pairs":
        return read_parquet(replace(config, path=str(pairs_path())))
    if name not in SETS:
        raise unknown("embedded data set", config.path, ["tiny:pairs", *(f"tiny:{name}" for name in SETS)])
    total = min(GROUPS, config.limit or GROUPS)
    image = Opener("", "the set")

    def examples() -> Iterator[Example | Skipped]:
        for number, row in enumerate(islice(rows(name), total)):
            where = f"{config.path} row {number}"
            yield read_row(row, schema_of(row, where), where, image)

    return Preferences(config.path, examples, total, f"{config.path} {TINY}")
