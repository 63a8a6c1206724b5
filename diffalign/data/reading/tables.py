"""Preference tables: parquet files, json lines, csv and hub datasets.

Everything is read row by row: a set need not fit in memory. pyarrow and datasets are imported when they are
used.
"""

import csv
import json
from collections.abc import Collection, Iterator, Mapping
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, ImageRef, Preferences, Skipped, digest
from diffalign.data.reading.rows import Schema, read_row, schema_of
from diffalign.errors import UserError, unknown

ROWS_AT_ONCE = 16  # a row holds two encoded images
JUDGED = ("Overall", "VQ", "MQ", "TA")  # label columns of a csv: visual and motion quality, text alignment
VERDICTS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "same": (0.5, 0.5), "": (None, None)}


def read_parquet(config: DataConfig) -> Preferences:
    """Parquet by path, glob or folder; UserError for none, a corrupt one, or missing columns."""
    files = parquet_files(config.path)
    if not files:
        raise UserError(
            f"data.path {config.path!r}: no parquet file there; "
            f"give a file, a glob such as 'pairs/*.parquet' or a folder"
        )
    total = sum(_open(file, config).metadata.num_rows for file in files)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]

    def rows() -> Iterator[Example | Skipped]:
        every = (item for file in files for item in _parquet_rows(file, config))
        return islice(every, config.limit)

    return Preferences(config.path, rows, min(total, config.limit or total), digest(repr(stats).encode()))


def parquet_files(path: str) -> list[Path]:
    """The parquet files that a path, a folder or a glob names, sorted."""
    place = Path(path).expanduser()
    if place.is_dir():
        return sorted(place.rglob("*.parquet"))
    if place.exists():
        return [place]
    return sorted(Path(name) for name in glob(str(place), recursive=True))


def _schema(columns: Collection[str], place: str, config: DataConfig) -> Schema:
    plain = config.view in ("demonstrations", "captions")
    schema = schema_of(columns, place, plain, rated=config.rewards_as != "extra")
    if schema.videos and config.frames is None:
        raise UserError(
            f"{place}: column {schema.images[0]!r} holds videos; data.frames is null, allowed: from 1 on"
        )
    return schema


def _open(file: Path, config: DataConfig) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: not readable as parquet ({_first_line(error)})") from error
    _schema(parquet.schema_arrow.names, str(file), config)  # before anything long begins
    return parquet


def _parquet_rows(file: Path, config: DataConfig) -> Iterator[Example | Skipped]:
    import pyarrow

    parquet = _open(file, config)
    schema = _schema(parquet.schema_arrow.names, str(file), config)
    number = 0
    batches = parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=schema.columns)
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield read_row(row, schema, f"{file.name} row {number}", embedded(file.parent))
                number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: damaged after row {number} ({_first_line(error)})") from error


def embedded(folder: Path) -> Any:
    """Images of a table's cells: bytes, datasets' {bytes, path}, or a path relative to the table."""

    def image(value: Any, place: str) -> ImageRef | None:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if not value:
            return None
        if isinstance(value, str):
            return ImageRef(folder / value)
        if isinstance(value, bytes):
            return ImageRef(value)
        raise UserError(f"{place}: a {type(value).__name__}; an image is the bytes of a file, or a path")

    return image


def read_jsonl(config: DataConfig) -> Preferences:
    """Json lines (or one json list), image paths relative to the file; UserError naming a bad line."""
    file = Path(config.path).expanduser()
    if not file.is_file():
        raise UserError(f"data.path {config.path!r}: no such file")

    def rows() -> Iterator[Example | Skipped]:
        for where, row in islice(json_rows(file), config.limit):
            yield read_row(row, _schema(row, where, config), where, image)

    def image(value: Any, place: str) -> ImageRef | None:
        if value is not None and not isinstance(value, str):
            raise UserError(f"{place}: {value!r}; an image is a path relative to the file")
        return ImageRef(file.parent / value) if value else None

    return Preferences(config.path, rows, None, None)


def read_csv(config: DataConfig) -> Preferences:
    """VideoAlign's csv (Liu et al. 2025, arXiv 2501.13918): ``path_A, path_B, prompt`` and labels A, B or
    same in the column ``config.label``; paths are relative to the file.

    Raises UserError for none, columns that are missing, and a label that is none.
    """
    file = Path(config.path).expanduser()
    if not file.is_file():
        raise UserError(f"data.path {config.path!r}: no such file")
    column = _label_column(next((list(row) for _, row in _csv_rows(file)), []), file, config)
    schema = _schema(("prompt", "video_0", "video_1", "label_0", "label_1"), str(file), config)

    def rows() -> Iterator[Example | Skipped]:
        for where, row in islice(_csv_rows(file), config.limit):
            label = (row[column] or "").strip()
            if label.casefold() not in VERDICTS:
                raise UserError(f"{where}: {column} is {label!r}; allowed: A, B, same, or nothing")
            first, second = VERDICTS[label.casefold()]
            values = {"prompt": row["prompt"], "video_0": row["path_A"], "video_1": row["path_B"]}
            labels = {"label_0": first, "label_1": second}
            yield read_row(values | labels, schema, where, embedded(file.parent))

    return Preferences(config.path, rows, None, None)


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """("file row n", cells by column)."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            for number, row in enumerate(csv.DictReader(lines)):
                yield f"{file.name} row {number}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as csv ({error})") from error


def _label_column(columns: list[str], file: Path, config: DataConfig) -> str:
    there = [name for name in JUDGED if name in columns]
    if not there or not {"path_A", "path_B", "prompt"} <= set(columns):
        raise UserError(
            f"{file}: found columns {', '.join(map(str, columns)) or 'none'}; needed path_A, path_B, prompt "
            f"and one of {', '.join(JUDGED)}"
        )
    if config.label:
        if config.label not in there:
            raise unknown("label (data.label)", config.label, there)
        return config.label
    if len(there) > 1 and there[0] != JUDGED[0]:
        raise UserError(f"{file}: several labels; set data.label to one of {', '.join(there)}")
    return there[0]


def json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file line n", object) of json lines, or of a .json file that is one list; else UserError."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if file.suffix == ".json" and text.lstrip().startswith("["):
        entries = ((f"{file.name} entry {i}", entry) for i, entry in enumerate(_parse(text, str(file))))
    else:  # not splitlines: json strings may hold other line separators than \n
        lines = (
            (f"{file.name} line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()
        )
        entries = ((where, _parse(line, where)) for where, line in lines)
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise UserError(
                f"{where}: {str(entry)[:60]!r}; "
                'needed an object such as {"prompt": ..., "chosen": ..., "rejected": ...}'
            )
        yield where, entry


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not json ({error.msg} at character {error.pos})") from error


def read_hub(config: DataConfig) -> Preferences:
    """A dataset of the Hugging Face hub, or what else ``datasets`` can load; else UserError."""
    dataset = _load_dataset(config)
    columns = dataset.column_names
    if columns is None:  # a stream without declared columns says them in its first row
        columns = list(next(iter(dataset), {}))
    schema = _schema(columns, f"dataset {config.path!r}, split {config.split!r}", config)
    dataset = dataset.select_columns(schema.columns)

    def rows() -> Iterator[Example | Skipped]:
        for number, row in enumerate(islice(dataset, config.limit)):
            yield read_row(row, schema, f"{config.path}[{config.split}] row {number}", embedded(Path()))

    total = None if config.streaming else min(len(dataset), config.limit or len(dataset))
    return Preferences(config.path, rows, total, None if config.streaming else dataset._fingerprint)


def _load_dataset(config: DataConfig) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(config.path, split=config.split, streaming=config.streaming)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(
            f"data.path {config.path!r}: no such file or folder, and as a hub dataset "
            f"(split {config.split!r}) it cannot be loaded: {_first_line(error)}"
        ) from error
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image | datasets.Video):  # keep the file's bytes: they key the cache
            dataset = dataset.cast_column(name, type(feature)(decode=False))
    return dataset


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
