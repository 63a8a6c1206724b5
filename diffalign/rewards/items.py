"""Images or videos and their prompts, read from what people have.

* a folder of images or videos, each with its prompt in ``NAME.txt`` beside it (or one list of prompts for all
of them, in the order of the names), or a folder with a ``manifest*.jsonl`` as sampling writes it;
* a run directory (its ``samples/`` folders);
* a parquet file in Pick-a-Pic's schema: ``caption``, ``jpg_0``, ``jpg_1``, each row giving two images;
* a jsonl file with ``prompt`` and ``image`` or ``video`` (a path, relative to the file), ``images`` or
``videos`` (several), or ``chosen`` and ``rejected``.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.videos import MOVING_SUFFIXES, VIDEO_SUFFIXES, begins_as_video

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_PAIRS = ("jpg_0", "jpg_1")
_ONE, _SEVERAL, _RIVALS = ("image", "video"), ("images", "videos"), ("chosen", "rejected")


@dataclass(frozen=True)
class Item:
    """One image or video to score.

    Attributes:
        prompt: its prompt.
        image: a file, or encoded bytes.
        row: what the output row that it belongs to says of it (file, row number, prompt); equal rows become
            one.
        suffix: of the score's name in that row: ``_0`` and ``_1`` for the images of a pair, else empty.
        of_videos: whether it lies among videos, where an animated GIF is one.
        where: place, for messages.
    """

    prompt: str
    image: Path | bytes = field(repr=False)
    row: tuple[tuple[str, str | int], ...]
    suffix: str = ""
    of_videos: bool = False

    @property
    def where(self) -> str:
        """The place, for messages: ``pairs.parquet row 3 jpg_0``."""
        words = [
            f"{value}" if name == "file" else f"{name} {value}"
            for name, value in self.row
            if name != "prompt"
        ]
        return " ".join(words) + (f" image{self.suffix}" if self.suffix else "")

    @property
    def is_video(self) -> bool:
        """Whether the file's name, or the bytes' beginning, is that of a video."""
        if isinstance(self.image, Path):
            return self.image.suffix.lower() in (MOVING_SUFFIXES if self.of_videos else VIDEO_SUFFIXES)
        return begins_as_video(self.image)

    def read(self) -> bytes:
        """The encoded image; OSError if the file cannot be read."""
        return self.image if isinstance(self.image, bytes) else self.image.read_bytes()


def read_items(path: Path | str, prompts: Sequence[str] | None = None) -> Iterator[Item]:
    """The items of a folder, run directory, parquet or jsonl file; see the module.

    ``prompts`` is for a folder without captions: one for all images, or one for each in the order of the
    names.

    Raises:
        UserError: nothing there, nothing to score, an image without a prompt, or a file of another layout.
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
        yield from _parquet(path)
    elif path.suffix == ".jsonl":
        yield from _jsonl(path)
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
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in known)
    if not files:
        raise UserError(f"{str(folder)!r} has no images or videos ({', '.join(known)})")
    videos = any(file.suffix.lower() in VIDEO_SUFFIXES for file in files)
    kind = "videos" if videos else "images"
    if prompts is not None and len(prompts) not in (1, len(files)):
        raise UserError(
            f"{len(prompts)} prompts for the {len(files)} {kind} of {str(folder)!r}: give one, or one each"
        )
    for i, file in enumerate(files):
        if prompts is not None:
            prompt = prompts[i if len(prompts) > 1 else 0]
        else:
            caption = file.with_suffix(".txt")
            if not caption.is_file():
                raise UserError(
                    f"{str(file)!r} has no prompt: {caption.name} is missing, and no prompts were given"
                )
            prompt = caption.read_text().strip()
        yield Item(prompt, file, (("file", str(file)), ("prompt", prompt)), of_videos=videos)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for i, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {i} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{path} line {i} has no text in the field 'prompt'")
        yield i, row


def _manifest(folder: Path) -> Iterator[Item]:
    rows = [row for manifest in sorted(folder.glob("manifest*.jsonl")) for _, row in _lines(manifest)]
    rows.sort(key=lambda row: (row.get("position", 0), row.get("number", 0)))
    for row in rows:
        file = folder / str(row.get("file", ""))
        if file.is_file():  # a run that was interrupted lists more than it has drawn
            yield Item(row["prompt"], file, (("file", str(file)), ("prompt", row["prompt"])))


def _jsonl(path: Path) -> Iterator[Item]:
    for i, row in _lines(path):
        files = _files(row)
        videos = any(
            name.startswith("video") or Path(str(file)).suffix.lower() in VIDEO_SUFFIXES
            for name, file in files.values()
        )
        for suffix, (field_name, file) in files.items():
            if not isinstance(file, str):
                raise UserError(
                    f"{path} line {i} has no path in the field {field_name!r}; needed: image or video, "
                    "images or videos (a list), or chosen and rejected"
                )
            identity = (("file", str(path)), ("row", i), ("prompt", row["prompt"]))
            yield Item(row["prompt"], path.parent / file, identity, suffix, videos)


def _files(row: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Of a row of jsonl, by the suffix of the scores' names: the field, and what stands there."""
    for name in _ONE:
        if name in row:
            return {"": (name, row[name])}
    for name in _SEVERAL:
        if name in row:
            files = row[name] if isinstance(row[name], list) else [None]
            return {f"_{number}": (name, file) for number, file in enumerate(files)}
    return {f"_{name}": (name, row.get(name)) for name in _RIVALS}


def _parquet(path: Path) -> Iterator[Item]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable parquet file: {error}") from error
    missing = [name for name in ("caption", *_PAIRS) if name not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"{str(path)!r} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}. "
            "Needed is Pick-a-Pic's schema: caption, jpg_0, jpg_1"
        )
    row = 0
    for batch in file.iter_batches(batch_size=64, columns=["caption", *_PAIRS]):
        for values in batch.to_pylist():
            if not isinstance(values["caption"], str):
                raise UserError(f"{path} row {row}: the caption is {values['caption']!r}, not a text")
            for i, name in enumerate(_PAIRS):
                data, identity = (
                    values[name],
                    (("file", str(path)), ("row", row), ("prompt", values["caption"])),
                )
                data = data["bytes"] if isinstance(data, dict) else data
                yield Item(values["caption"], data or b"", identity, f"_{i}")
            row += 1
