"""Read the real clips that pairs are made from: files with captions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from diffalign.data.reading.folders import read_caption
from diffalign.data.reading.json_files import json_rows
from diffalign.errors import UserError
from diffalign.media.videos import MOVING_SUFFIXES

VIDEOS = frozenset(MOVING_SUFFIXES)
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
FIELDS = ("video", "image", "path")
"""Names of the path's field in JSON lines; the first present one is used."""


@dataclass(frozen=True)
class Clip:
    """A file and its caption.

    Attributes:
        name: its path in the listing, from which the noise of its pairs is derived.
        prompt: its caption.
        path: path of the file.
    """

    name: str
    prompt: str
    path: Path


def read_clips(source: str, limit: int | None = None) -> list[Clip]:
    """Return the clips of a folder or of JSON lines.

    Args:
        source: a folder of ``NAME.mp4`` with captions in ``NAME.txt``, subfolders included; or a file of
            ``{"prompt": ..., "video": path}`` with paths relative to it.
        limit: largest number of clips; None: all.

    Raises:
        UserError: no such source, no clips, a clip without a caption or with one that is not UTF-8, or a row
            without a caption or a file.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        clips = list(_of_folder(place))
    elif place.is_file() and place.suffix in (".jsonl", ".json"):
        clips = list(_of_rows(place))
    else:
        raise UserError(
            f"--videos {source!r}: nothing to read there; allowed: a folder of NAME.mp4 with NAME.txt, or a "
            ".jsonl file of prompt and video"
        )
    if not clips:
        raise UserError(f"--videos {source!r}: no clips in it; allowed: {', '.join(sorted(VIDEOS | IMAGES))}")
    return clips[:limit]


def _of_folder(folder: Path) -> Iterator[Clip]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEOS | IMAGES)
    uncaptioned = [file.name for file in files if not file.with_suffix(".txt").is_file()]
    if uncaptioned:
        raise UserError(
            f"{folder}: no caption for {_shortened(uncaptioned)}; needed: {Path(uncaptioned[0]).stem}.txt "
            "beside it, and so for each clip"
        )
    for file in files:
        caption = read_caption(file.with_suffix(".txt"))
        if not caption:
            raise UserError(f"{file.with_suffix('.txt')} is empty; needed: the caption of {file.name}")
        yield Clip(file.relative_to(folder).as_posix(), caption, file)


def _of_rows(file: Path) -> Iterator[Clip]:
    for where, row in json_rows(file):
        prompt = next((row[name] for name in ("prompt", "caption", "text") if name in row), None)
        path = next((row[name] for name in FIELDS if name in row), None)
        if not isinstance(prompt, str) or not prompt.strip() or not isinstance(path, str):
            raise UserError(f'{where}: needed {{"prompt": text, "video": path}}; found {", ".join(row)}')
        clip = (file.parent / Path(path).expanduser()).resolve()
        if not clip.is_file():
            raise UserError(f"{where}: no such file: {path}")
        yield Clip(path, prompt, clip)


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
