"""Preference tables: parquet files, json lines, csv, hub datasets and folders of ``Dataset.save_to_disk``.

Tables are read row by row, so a set need not fit in memory (json is parsed file by file). The columns of
every file are checked before anything is encoded. pyarrow and datasets are imported when they are used.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.csv_files import Rows, csv_columns, csv_rows
from diffalign.data.reading.downloads import Downloads
from diffalign.data.reading.examples import Example, Preferences, Skipped, digest
from diffalign.data.reading.files import Opener, Table, tables_of
from diffalign.data.reading.json_files import json_rows, splits_in
from diffalign.data.reading.layout import Layout
from diffalign.data.reading.rows import mapping_of, read_row, rivals, schema_of
from diffalign.data.reading.splits import of_split
from diffalign.errors import UserError

ROWS_AT_ONCE = 16  # a row holds two encoded images


def layout_of(columns: Mapping[str, Any], place: str, config: DataConfig) -> Layout:
    """Return the layout of a table's columns under these settings; UserError where none fits."""
    plain = config.view in ("demonstrations", "captions")
    mapped = mapping_of(config.columns)
    layout = schema_of(columns, place, plain, config.rewards_as != "extra", mapped, config.label)
    if layout.videos and config.frames is None:
        name = layout.schema.files.columns[0]
        raise UserError(f"{place}: column {name!r} holds videos; data.frames is null, allowed: from 1 on")
    return layout


def as_preferences(
    config: DataConfig,
    layout: Layout,
    rows: Callable[[], Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]],
    total: int | None,
    fingerprint: str | None,
    *,
    notes: Sequence[str] = (),
    everywhere: bool = False,
    others: Iterable[Layout] = (),
) -> Preferences:
    """Return the set of some rows.

    Args:
        config: of the data.
        layout: of the first table, for the name of the schema and the unused columns.
        rows: gives (place, cells, layout, opener) each.
        total: the number of rows, if it is known.
        fingerprint: of the files.
        notes: on data that was left out.
        everywhere: rows of a group may be anywhere, and all rows fit in memory.
        others: layouts of further tables or rows, for what they leave unused.
    """
    rated = config.rewards_as != "extra"

    def examples() -> Iterator[Example | Skipped]:
        every = islice(rows(), config.limit)
        if layout.schema.group is None:
            yield from (read_row(row, one, where, opener, rated) for where, row, one, opener in every)
            return
        keyed = (
            (str(row.get(one.schema.group or one.prompt)), read_row(row, one, where, opener, rated))
            for where, row, one, opener in every
        )
        yield from rivals(keyed, layout, everywhere)

    if layout.source:
        notes = [*notes, f"source images, which the others were made from, in column {layout.source!r}"]
    if unused := sorted({name for one in (layout, *others) for name in one.unused}):
        notes = [*notes, f"columns that are not used: {', '.join(unused)}"]
    marks = (
        [config.columns, config.root, config.config] if config.columns or config.root or config.config else []
    )
    mark = digest(repr((fingerprint, *marks)).encode()) if fingerprint and marks else fingerprint
    known = None if total is None or layout.schema.group is not None else min(total, config.limit or total)
    return Preferences(config.path, examples, known, mark, schema=layout.schema.name, notes=notes)


def downloads_of(config: DataConfig) -> Downloads:
    """Return the store of images at web addresses."""
    folder = Path(config.downloads).expanduser() if config.downloads else None
    return Downloads(folder, config.max_downloads)


def files_of(config: DataConfig, suffixes: Sequence[str], kind: str) -> tuple[list[Table], list[str]]:
    """Return the tables of ``data.path`` (of a folder those of ``data.split``) and notes on what is left out.

    Raises:
        UserError: there is none, or no such split.
    """
    tables = tables_of(config.path, suffixes)
    if not tables:
        raise UserError(
            f"data.path {config.path!r}: no such file, or no {kind} file there; give a file, a glob such as "
            f"'pairs/*{suffixes[0]}' or a folder"
        )
    named = len(tables) == 1 or any(sign in config.path for sign in "*?[")
    if named and config.split == "train":
        return tables, []  # these files were asked for, whatever their names say
    return of_split(tables, _fixed_part(tables[0].folder, config.path), config.split)


def _fixed_part(folder: str, path: str) -> str:
    """Return the folder below which the files of a folder or a glob, or a file, tell their split."""
    before = re.split(r"[*?\[]", path)[0]
    if before != path:
        return before.rpartition("/")[0]
    return path if folder.startswith(path.rstrip("/")) else folder


def read_parquet(config: DataConfig) -> Preferences:
    """Read parquet by path, glob, folder or URL; UserError for none, a corrupt one, or missing columns."""
    tables, notes = files_of(config, (".parquet",), "parquet")
    downloads = downloads_of(config)
    layouts = [_parquet_layout(table, config) for table in tables]  # before anything slow begins
    total = sum(rows for _, rows in layouts)
    stats = [table.mark for table in tables]

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for table, (layout, _) in zip(tables, layouts, strict=True):
            opener = table.opener(layout.schema.roots, config.root, downloads)
            for where, row in parquet_rows(table, sorted(layout.used)):
                yield where, row, layout, opener

    mark, others = digest(repr(stats).encode()), [layout for layout, _ in layouts]
    return as_preferences(config, others[0], rows, total, mark, notes=notes, others=others)


def _parquet_layout(table: Table, config: DataConfig) -> tuple[Layout, int]:
    with table.open() as file:
        parquet = open_parquet(file, table)
        return layout_of(outline(parquet.schema_arrow), table.place, config), parquet.metadata.num_rows


def open_parquet(file: Any, table: Table) -> Any:
    """Return an open parquet file; UserError where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table.place}: not readable as parquet ({first_line(error)})") from error


def parquet_rows(table: Table, columns: Sequence[str]) -> Rows:
    """Yield the rows of a parquet file with some of its columns; UserError where it is damaged."""
    import pyarrow

    number = 0
    with table.open() as file:
        try:
            for batch in open_parquet(file, table).iter_batches(
                batch_size=ROWS_AT_ONCE, columns=list(columns)
            ):
                for row in batch.to_pylist():
                    yield f"{table.name} row {number}", row
                    number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{table.place}: damaged after row {number} ({first_line(error)})") from error


def outline(schema: Any) -> dict[str, Any]:
    """Return the columns of an Arrow schema with a prototype of each: "" text, b"" bytes, 0 others."""
    from pyarrow import types

    def of(kind: Any) -> Any:
        if types.is_struct(kind):
            return {field.name: of(field.type) for field in kind}
        if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
            return [of(kind.value_type)]
        if types.is_string(kind) or types.is_large_string(kind):
            return ""
        return b"" if types.is_binary(kind) or types.is_large_binary(kind) else 0

    return {field.name: of(field.type) for field in schema}


def read_jsonl(config: DataConfig) -> Preferences:
    """Read json lines, or json documents of rows, paths relative to the file; UserError naming a bad line."""
    tables, notes = _json_files(config)
    downloads = downloads_of(config)
    known: dict[Any, Layout] = {}

    def each() -> Iterator[tuple[str, Mapping[str, Any], Layout, Table]]:
        for table in tables:
            for where, row in json_rows(table, split=config.split):
                shape = _shape(row)
                if shape not in known:
                    known[shape] = layout_of(row, where, config)
                yield where, row, known[shape], table

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for where, row, layout, table in each():
            yield where, row, layout, table.opener(layout.schema.roots, config.root, downloads)

    total = sum(1 for _ in islice(each(), config.limit))  # every row's columns, before a model is loaded
    if not known:
        raise UserError(f"data.path {config.path!r}: no rows in it")
    first = next(iter(known.values()))
    mixed = {layout.schema.group for layout in known.values()}
    if len(mixed) > 1:
        names = sorted({layout.schema.name for layout in known.values()})
        raise UserError(
            f"data.path {config.path!r}: rows of {' and '.join(names)} in one set; give one of them"
        )
    return as_preferences(
        config, first, rows, total, None, notes=notes, everywhere=True, others=known.values()
    )


def _json_files(config: DataConfig) -> tuple[list[Table], list[str]]:
    """Return the json files of the set, and notes; files that hold splits themselves are not chosen by
    name."""
    suffixes = (".jsonl", ".json", ".ndjson")
    tables = tables_of(config.path, suffixes)
    if config.split != "train" and tables and all(map(splits_in, tables)):
        return tables, []
    return files_of(config, suffixes, "json")


def _shape(value: Any) -> Any:
    """Return the names of a row's fields, nested ones included, which its layout depends on."""
    if isinstance(value, Mapping):
        return tuple((name, _shape(one)) for name, one in sorted(value.items()))
    return (
        (_shape(value[0]),) if isinstance(value, list) and value and isinstance(value[0], Mapping) else None
    )


def read_csv(config: DataConfig) -> Preferences:
    """Read csv with a line of column names; paths are relative to the file.

    Raises:
        UserError: none, columns that are missing, and a label that is none.
    """
    tables, notes = files_of(config, (".csv", ".tsv"), "csv")
    downloads = downloads_of(config)
    heads = [next((dict(row) for _, row in csv_rows(table)), None) or csv_columns(table) for table in tables]
    layouts = [layout_of(head, table.place, config) for head, table in zip(heads, tables, strict=True)]

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for table, layout in zip(tables, layouts, strict=True):
            opener = table.opener(layout.schema.roots, config.root, downloads)
            yield from ((where, row, layout, opener) for where, row in csv_rows(table))

    return as_preferences(config, layouts[0], rows, None, None, notes=notes, everywhere=True, others=layouts)


def read_hub(config: DataConfig) -> Preferences:
    """Read a dataset of the Hugging Face hub, or another one that ``datasets`` can load; UserError if it
    cannot."""
    return _of_dataset(_load_dataset(config), config)


def read_saved(config: DataConfig) -> Preferences:
    """Read a folder that ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(Path(config.path).expanduser()))
    except Exception as error:
        raise UserError(f"data.path {config.path!r}: not a saved dataset ({first_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise UserError(f"data.split is {config.split!r}; {config.path!r} has {', '.join(loaded)}")
        loaded = loaded[config.split]
    elif config.split not in ("train", "all"):
        raise UserError(
            f"data.split is {config.split!r}, but {config.path!r} is one saved dataset without splits; "
            "allowed: train, all"
        )
    return _of_dataset(_undecoded(loaded), config)


def _of_dataset(dataset: Any, config: DataConfig) -> Preferences:
    # a stream without declared columns has them in its first row
    features = dataset.features
    columns = outline(features.arrow_schema) if features else dict(next(iter(dataset), {}))
    layout = layout_of(columns, f"dataset {config.path!r}, split {config.split!r}", config)
    dataset = dataset.select_columns(sorted(layout.used))
    opener = Opener("", "the set", layout.schema.roots, config.root, downloads_of(config))

    def rows() -> Iterator[tuple[str, Mapping[str, Any], Layout, Opener]]:
        for number, row in enumerate(dataset):
            yield f"{config.path}[{config.split}] row {number}", row, layout, opener

    total = None if config.streaming else len(dataset)
    return as_preferences(config, layout, rows, total, None if config.streaming else dataset._fingerprint)


def _load_dataset(config: DataConfig) -> Any:
    import datasets

    try:
        dataset = datasets.load_dataset(
            config.path, config.config, split=config.split, streaming=config.streaming
        )
    except (
        Exception
    ) as error:  # datasets raises RuntimeError, OSError, ValueError, and what its readers raise
        hint = ""
        if "script" in str(error):
            hint = (
                "; it has a loading script, which datasets no longer runs: give its files or a copy of them"
            )
        elif "onfig" in str(error) and not config.config:
            hint = "; name one: data.config"
        raise UserError(
            f"data.path {config.path!r}: no such file or folder, and as a hub dataset "
            f"(split {config.split!r}) it cannot be loaded: {first_line(error)}{hint}"
        ) from error
    return _undecoded(dataset)


def _undecoded(dataset: Any) -> Any:
    """Return the dataset with images and videos as the bytes of their files: those key the cache."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, datasets.Image | datasets.Video):
            dataset = dataset.cast_column(name, type(feature)(decode=False))
        elif isinstance(inner, datasets.Image | datasets.Video):
            dataset = dataset.cast_column(name, type(feature)(type(inner)(decode=False)))
    return dataset


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
