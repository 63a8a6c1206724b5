"""Read images or videos and their prompts for scoring.

Accepted inputs:

* a folder of images or videos, each with its prompt in ``NAME.txt`` beside it, or with prompts passed
  separately in the order of the names;
* a folder with a ``manifest*.jsonl``, as sampling writes it;
* a folder of pairs or likes (such as ``w/`` and ``l/``), as ``data.reading.folders`` reads it;
* a run directory (its ``samples/`` folders);
* a parquet or jsonl file with a prompt column and the image or video columns that training reads
  (``data.reading.schemas``), such as ``jpg_0`` and ``jpg_1``, ``image`` or ``videos``: encoded files (parquet
  only), or paths relative to the table.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.config.schema import DataConfig
from diffalign.data.reading.folders import IMAGES, is_preference_folder, read_folder
from diffalign.data.reading.schemas import PROMPTS, ListOf, media_columns
from diffalign.data.reading.sources import holds_no_image, names_a_source, source_columns
from diffalign.errors import UserError
from diffalign.media.images import read_file
from diffalign.media.sourced import SourcedPrompt
from diffalign.media.videos import MOVING_SUFFIXES, VIDEO_SUFFIXES, begins_as_video
from diffalign.utils.text import json_lines, read_text

IMAGE_SUFFIXES = tuple(sorted(IMAGES))
_NEEDED = (
    "needed: image or video, images or videos (a list), chosen and rejected, jpg_0 and jpg_1 as Pick-a-Pic "
    "has it, or the columns of another published set"
)
_ROWS = 64  # rows of a parquet file in memory at once


@dataclass(frozen=True)
class Item:
    """One image or video to score.

    Attributes:
        prompt: the prompt; that of an edit has its source image.
        image: path of a file, or its encoded bytes.
        row: name and value of the identifying columns of its output row (file, row number, prompt). Items
            with equal values share a row.
        suffix: suffix of the score's column in that row: ``_0`` and ``_1`` for the images of a pair, else
            empty.
        of_videos: whether the input holds videos; an animated GIF then counts as a video.
    """

    prompt: str
    image: Path | bytes = field(repr=False)
    row: tuple[tuple[str, str | int], ...]
    suffix: str = ""
    of_videos: bool = False

    @property
    def where(self) -> str:
        """The item's location, for messages: ``pairs.parquet row 3 image_0``."""
        parts = [
            f"{value}" if name == "file" else f"{name} {value}"
            for name, value in self.row
            if name != "prompt"
        ]
        return " ".join(parts) + (f" image{self.suffix}" if self.suffix else "")

    @property
    def is_video(self) -> bool:
        """Whether the file's suffix, or the first bytes of the data, are those of a video."""
        if isinstance(self.image, Path):
            return self.image.suffix.lower() in (MOVING_SUFFIXES if self.of_videos else VIDEO_SUFFIXES)
        return begins_as_video(self.image)

    def read(self) -> bytes:
        """Return the encoded image; OSError if the file cannot be read."""
        return self.image if isinstance(self.image, bytes) else read_file(self.image)


def read_items(path: Path | str, prompts: Sequence[str] | None = None, edits: bool = False) -> Iterator[Item]:
    """Yield the items of a folder, run directory, parquet or jsonl file; the module docstring lists layouts.

    Args:
        path: the input.
        prompts: for a folder without captions: one prompt for all images, or one each, in the order of the
            names. They may have source images of their own (``media.sourced``).
        edits: whether rows of a table are edits: their prompts then have the source image of the row.

    Raises:
        UserError: no such input, no images or videos, an image without a prompt, or an unknown layout; an
            edit without a source, or with several columns that may be it.
    """
    path = Path(path)
    if path.is_dir():
        if prompts is None and not list(path.glob("manifest*.jsonl")) and (path / "samples").is_dir():
            yield from _run(path / "samples")
        else:
            yield from _folder(path, prompts)
    elif not path.is_file():
        raise UserError(f"there is no file or folder {str(path)!r} to score")
    elif prompts is not None:
        raise UserError(
            f"prompts were given, but {str(path)!r} is a file that has its own; they are for folders"
        )
    elif path.suffix == ".parquet":
        yield from _parquet(path, edits)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path, edits)
    else:
        raise UserError(
            f"cannot score {str(path)!r}; allowed: a folder of images or videos, a .parquet or a .jsonl file"
        )


def _run(samples: Path) -> Iterator[Item]:
    folders = sorted(folder for folder in samples.iterdir() if list(folder.glob("manifest*.jsonl")))
    if not folders:
        raise UserError(
            f"{str(samples)!r} holds no drawn samples; run with validation.every set, or `diffalign generate`"
        )
    for folder in folders:
        yield from _manifest(folder)


def _folder(folder: Path, prompts: Sequence[str] | None) -> Iterator[Item]:
    if prompts is None and list(folder.glob("manifest*.jsonl")):
        yield from _manifest(folder)
        return
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in known and not f.name.startswith("."))
    uncaptioned = any(not file.with_suffix(".txt").is_file() for file in files)
    if prompts is None and (uncaptioned or not files) and is_preference_folder(folder):
        yield from _preferences(folder)
        return
    if not files:
        raise UserError(f"{str(folder)!r} has no images or videos ({', '.join(known)})")
    videos = any(file.suffix.lower() in VIDEO_SUFFIXES for file in files)
    kind = "videos" if videos else "images"
    if prompts is not None and len(prompts) not in (1, len(files)):
        raise UserError(
            f"{len(prompts)} prompts for the {len(files)} {kind} of {str(folder)!r}: give one, or one each"
        )
    captions = [_caption(file) for file in files] if prompts is None else list(prompts)
    if len(captions) == 1:
        captions *= len(files)
    for file, prompt in zip(files, captions, strict=True):
        yield Item(prompt, file, (("file", str(file)), ("prompt", prompt)), of_videos=videos)


def _preferences(folder: Path) -> Iterator[Item]:
    """Yield the images or videos of a folder of pairs or likes, in the layout that training reads."""
    videos = any(file.suffix.lower() in VIDEO_SUFFIXES for file in folder.rglob("*"))
    for example in read_folder(DataConfig(path=str(folder), frames=1 if videos else None)):
        for image in example.images:
            assert isinstance(image.source, Path)  # read_folder gives paths
            row = (("file", str(image.source)), ("prompt", example.prompt))
            yield Item(example.prompt, image.source, row, of_videos=videos)


def _caption(file: Path) -> str:
    caption = file.with_suffix(".txt")
    if not caption.is_file():
        raise UserError(f"{str(file)!r} has no prompt: {caption.name} is missing, and no prompts were given")
    return read_text(caption).strip()


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for where, row in json_lines(path, example='{"prompt": ...}'):
        yield int(where.rpartition(" ")[2]), row


def _prompt(row: Mapping[str, Any], where: str) -> str:
    name = next((name for name in PROMPTS if name in row), "prompt")
    if not isinstance(row.get(name), str):
        raise UserError(f"{where} has no text in the field {name!r}, but {str(row.get(name))[:60]}")
    return str(row[name])


def _manifest(folder: Path) -> Iterator[Item]:
    rows = [
        (row, _prompt(row, f"{manifest} line {i}"))
        for manifest in sorted(folder.glob("manifest*.jsonl"))
        for i, row in _lines(manifest)
    ]
    rows.sort(key=lambda one: (one[0].get("position", 0), one[0].get("number", 0)))
    for row, prompt in rows:
        file = folder / str(row.get("file", ""))
        if file.is_file():  # the manifest of an interrupted run lists samples that were not drawn
            yield Item(prompt, file, (("file", str(file)), ("prompt", prompt)))


def _jsonl(path: Path, edits: bool) -> Iterator[Item]:
    for i, row in _lines(path):
        yield from _of_row(row, i, path, f"{path} line {i}", edits)


def _of_row(row: Mapping[str, Any], number: int, table: Path, where: str, edits: bool) -> Iterator[Item]:
    """Yield the items of a table's row; ``where`` is its location, for messages."""
    prompt, files = _prompt(row, where), _files(row, where)
    if edits:
        prompt = SourcedPrompt(prompt, _source(row, {name for name, _ in files.values()}, table, where))
    identity = (("file", str(table)), ("row", number), ("prompt", str(prompt)))
    named = any(name.startswith("video") for name, _ in files.values())
    videos = named or any(Path(str(file)).suffix.lower() in VIDEO_SUFFIXES for _, file in files.values())
    for suffix, (name, value) in files.items():
        value = _file(value)
        if value is None and table.suffix == ".parquet":
            value = b""  # an empty cell counts as an unreadable image
        if not isinstance(value, bytes | str):
            raise UserError(f"{where} has no path in the field {name!r}; {_NEEDED}")
        value = table.parent / value if isinstance(value, str) else value
        yield Item(prompt, value, identity, suffix, videos)


def _file(value: Any) -> Any:
    """Return the bytes or the path of a cell, which may be the image struct of the `datasets` library."""
    return value.get("bytes") or value.get("path") if isinstance(value, Mapping) else value


def _source(row: Mapping[str, Any], media: Set[str], table: Path, where: str) -> Path | bytes:
    """Return the source image of a row whose columns ``media`` hold the edited ones."""
    others = {name: value for name, value in row.items() if name not in media}
    rivals = len(media) > 1 or not media.isdisjoint(("images", "videos"))
    found = [name for name in source_columns(others, rivals) if not holds_no_image(name, others)]
    value = _file(others[found[0]]) if len(found) == 1 else None
    if not isinstance(value, bytes | str) or not value:
        raise UserError(
            f"{where}: a reward of edits needs the one source image that {' and '.join(sorted(media))} were "
            f"made from; columns that may be it: {', '.join(found) or 'none'}; allowed: one of source, "
            "source_image, path_src or its like, with a file"
        )
    return table.parent / value if isinstance(value, str) else value


def has_media(columns: Collection[str]) -> bool:
    """Return whether a table with these columns holds images or videos."""
    return media_columns(columns) is not None


def _files(row: Mapping[str, Any], where: str) -> dict[str, tuple[str, Any]]:
    """Return the (column, cell) of each image or video of a row, by the suffix of its score's column."""
    files = media_columns(row)
    if files is None:
        raise UserError(f"{where} has no image or video; it has {', '.join(row)}; {_NEEDED}")
    if isinstance(files, ListOf):
        cells = row[files.column] if isinstance(row[files.column], list) else [None]
        return {f"_{number}": (files.column, value) for number, value in enumerate(cells)}
    if len(files.columns) == 1:
        return {"": (files.columns[0], row[files.columns[0]])}
    return {f"_{name.rpartition('_')[2]}" if name[-2:] in ("_0", "_1") else f"_{name}": (name, row[name])
            for name in files.columns}  # fmt: skip


def _parquet(path: Path, edits: bool) -> Iterator[Item]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable parquet file: {error}") from error
    columns = file.schema_arrow.names
    prompt = next((name for name in PROMPTS if name in columns), None)
    media = media_columns(columns)
    if prompt is None or media is None:
        what = "column 'caption'" if prompt is None else "column of images or videos"
        raise UserError(
            f"{str(path)!r} has no {what}; it has {', '.join(columns)}. {_NEEDED}; and a caption or prompt"
        )
    wanted = dict.fromkeys([prompt, *media.columns])
    if edits:
        wanted |= dict.fromkeys(name for name in columns if names_a_source(name) or name == "image")
    row = 0
    for batch in file.iter_batches(batch_size=_ROWS, columns=list(wanted)):
        for values in batch.to_pylist():
            yield from _of_row(values, row, path, f"{path} row {row}", edits)
            row += 1
