"""Preference folders: ``w/`` + ``l/`` (or ``chosen/`` + ``rejected/``) with equal names, or ``_w`` / ``_l``
suffixes; of single images ``liked/`` + ``disliked/``, either of which may be missing.

With ``data.frames`` the files are videos. The caption of ``cat.png`` or ``cat.mp4`` stands in ``cat.txt``,
beside the winner, beside the loser, or in the folder itself. A file without its rival or its caption is an
error that names it: a pair lost in silence is worse than a run that does not start.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, ImageRef, Preferences, Skipped
from diffalign.errors import UserError
from diffalign.media.videos import MOVING_SUFFIXES

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
VIDEOS = frozenset(MOVING_SUFFIXES)
SIDES = (("w", "l"), ("chosen", "rejected"))
LIKES = (("liked", 1.0), ("disliked", 0.0))


def is_preference_folder(folder: Path) -> bool:
    """Whether a folder looks like pairs of image or video files, complete or not, or like likes."""
    sides = [side for pair in SIDES for side in pair] + [side for side, _ in LIKES]
    named = any((folder / side).is_dir() for side in sides)
    return named or any(
        file.suffix.lower() in IMAGES | VIDEOS and file.stem.endswith(("_w", "_l"))
        for file in folder.iterdir()
    )


def read_folder(config: DataConfig) -> Preferences:
    """Pairs or likes of a folder; UserError naming what stands alone, has no caption, or has a name twice."""
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path {config.path!r}: no such folder")
    if any((root / side).is_dir() for side, _ in LIKES):
        return _likes(root, config)
    pairs = sorted(_pairs(root, config.frames is not None).items())

    def rows() -> Iterator[Example | Skipped]:
        for stem, (winner, loser, caption) in islice(pairs, config.limit):
            text = caption.read_text(encoding="utf-8").strip()
            yield Example(text, (ImageRef(winner), ImageRef(loser)), (1.0, 0.0), f"{root.name}/{stem}")

    return Preferences(config.path, rows, min(len(pairs), config.limit or len(pairs)), None)


def _likes(root: Path, config: DataConfig) -> Preferences:
    """``liked/`` and ``disliked/`` side by side, by name, so that a limit takes of both."""
    if paired := [side for pair in SIDES for side in pair if (root / side).is_dir()]:
        raise UserError(f"{root}: liked/ or disliked/ beside {paired[0]}/; which of them is meant?")
    videos = config.frames is not None
    files = [
        (stem, side, score, file)
        for side, score in LIKES
        for stem, file in _files(root / side, videos).items()
    ]
    if not files:
        raise UserError(f"{root}: {_none(videos, 'liked/ and disliked/')}")
    captions = {file: _caption(root, stem, file) for stem, _, _, file in files}
    _all_captioned(root, {f"{file.parent.name}/{file.stem}": caption for file, caption in captions.items()})

    def rows() -> Iterator[Example | Skipped]:
        for stem, side, score, file in islice(sorted(files), config.limit):
            if caption := captions[file]:
                text = caption.read_text(encoding="utf-8").strip()
                yield Example(text, (ImageRef(file),), (score,), f"{root.name}/{side}/{stem}")

    return Preferences(config.path, rows, min(len(files), config.limit or len(files)), None)


def _pairs(root: Path, videos: bool) -> dict[str, tuple[Path, Path, Path]]:
    """(winner, loser, caption) by stem."""
    sides = next((pair for pair in SIDES if any((root / side).is_dir() for side in pair)), None)
    if sides:
        winners, losers = _files(root / sides[0], videos), _files(root / sides[1], videos)
        if not winners and not losers:
            raise UserError(f"{root}: {_none(videos, f'{sides[0]}/ and {sides[1]}/')}")
        names = (f"{sides[0]}/", f"{sides[1]}/")
    else:
        files = _files(root, videos)
        strays = [file.name for stem, file in files.items() if not stem.endswith(("_w", "_l"))]
        if strays or not files:
            what = f"neither _w nor _l ends the name of {_some(strays)}" if strays else _none(videos, "it")
            raise UserError(
                f"{root}: {what}; needed w/ and l/ (or chosen/ and rejected/) "
                f"with equal names, or NAME_w and NAME_l"
            )
        winners = {stem[:-2]: file for stem, file in files.items() if stem.endswith("_w")}
        losers = {stem[:-2]: file for stem, file in files.items() if stem.endswith("_l")}
        names = ("NAME_w", "NAME_l")
    for here, there, name in ((winners, losers, names[1]), (losers, winners, names[0])):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise UserError(
                f"{root}: no rival in {name} for {_some([here[stem].name for stem in alone])}; "
                f"every one needs one on the other side"
            )
    captions = {stem: _caption(root, stem, winners[stem], losers[stem]) for stem in winners}
    _all_captioned(root, captions)
    return {stem: (winners[stem], losers[stem], caption) for stem, caption in captions.items() if caption}


def _none(videos: bool, place: str) -> str:
    return f"no videos in {place}" if videos else f"no images in {place} (videos need data.frames)"


def _files(folder: Path, videos: bool) -> dict[str, Path]:
    """Image or video files by stem."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() not in (VIDEOS if videos else IMAGES):
            continue
        if file.stem in found:
            raise UserError(
                f"{folder}: {found[file.stem].name} and {file.name} have the same name; which one is meant?"
            )
        found[file.stem] = file
    return found


def _caption(root: Path, stem: str, *images: Path) -> Path | None:
    places = (*(image.with_suffix(".txt") for image in images), root / f"{stem}.txt")
    return next((place for place in places if place.is_file()), None)


def _all_captioned(root: Path, captions: Mapping[str, Path | None]) -> None:
    missing = sorted(stem for stem, caption in captions.items() if caption is None)
    if missing:
        raise UserError(
            f"{root}: no caption for {_some(missing)}; needed {missing[0]}.txt beside it or in the folder"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
