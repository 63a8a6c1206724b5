"""Preference folders: ``w/`` + ``l/`` (or ``chosen/`` + ``rejected/``, ``win/`` + ``lose/``) with equal
names, or ``_w`` / ``_l`` suffixes; of single images ``liked/`` + ``disliked/``, either of which may be
missing.

With ``data.frames`` the files are videos. The caption of ``cat.png`` or ``cat.mp4`` stands in ``cat.txt`` (or
another of ``CAPTIONS``), beside the winner, beside the loser, or in the folder itself. A file without its
rival or its caption is an error that names it, since silently losing pairs is worse than a run that does not
start. Other files are counted and named; hidden files (macOS's ``._`` ones too) are ignored.
"""

from collections.abc import Iterable, Iterator, Mapping
from glob import escape
from itertools import islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, ImageRef, Preferences, Skipped
from diffalign.data.reading.splits import some
from diffalign.errors import UserError
from diffalign.media.images import IMAGE_SUFFIXES
from diffalign.media.videos import MOVING_SUFFIXES
from diffalign.utils.text import read_text

IMAGES = frozenset(IMAGE_SUFFIXES)
VIDEOS = frozenset(MOVING_SUFFIXES)
SIDES = (("w", "l"), ("chosen", "rejected"), ("win", "lose"))
LIKES = (("liked", 1.0), ("disliked", 0.0))
CAPTIONS = (".txt", ".TXT", ".caption")
"""Suffixes of captions, the one that counts first."""


def is_preference_folder(folder: Path) -> bool:
    """Return whether a folder looks like pairs of image or video files, complete or not, or like liked
    ones."""
    sides = [side for pair in SIDES for side in pair] + [side for side, _ in LIKES]
    named = any((folder / side).is_dir() for side in sides)
    return named or any(
        file.suffix.lower() in IMAGES | VIDEOS and file.stem.endswith(("_w", "_l"))
        for file in folder.iterdir()
        if not file.name.startswith(".")
    )


def read_folder(config: DataConfig) -> Preferences:
    """Read pairs or likes of a folder.

    Raises:
        UserError: a file without rival or caption, or with the name of another; a caption that is not UTF-8;
            a setting for tables.
    """
    root = Path(config.path).expanduser()
    if not root.is_dir():
        raise UserError(f"data.path {config.path!r}: no such folder")
    if config.columns or config.split != "train":
        name, value = ("columns", config.columns) if config.columns else ("split", config.split)
        raise UserError(
            f"data.{name} is {value!r}, but {config.path!r} is a folder of images; it is for tables"
        )
    if any((root / side).is_dir() for side, _ in LIKES):
        return _likes(root, config)
    pairs = sorted(_pairs(root, config.frames is not None).items())
    texts = {stem: read_caption(caption) for stem, (_, _, caption) in pairs}

    def rows() -> Iterator[Example | Skipped]:
        for stem, (winner, loser, _) in islice(pairs, config.limit):
            images = (ImageRef(winner), ImageRef(loser))
            yield Example(texts[stem], images, (1.0, 0.0), f"{root.name}/{stem}")

    used = {file for _, files in pairs for file in files}
    for stem, (winner, loser, _) in pairs:  # a second, equal caption may be dropped
        again = [place for place in _caption_places(root, stem, winner, loser) if place not in used]
        used |= {place for place in again if read_caption(place) == texts[stem]}
    total = min(len(pairs), config.limit or len(pairs))
    return Preferences(config.path, rows, total, None, schema="folder of pairs", notes=_left(root, used))


def _likes(root: Path, config: DataConfig) -> Preferences:
    """Read ``liked/`` and ``disliked/`` alternately, by name, so that a limit takes some of both."""
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
    found = {file: _caption(root, stem, file) for stem, _, _, file in files}
    _all_captioned(root, {f"{file.parent.name}/{file.stem}": caption for file, caption in found.items()})
    captions = {file: read_caption(caption) for file, caption in found.items() if caption}

    def rows() -> Iterator[Example | Skipped]:
        for stem, side, score, file in islice(sorted(files), config.limit):
            yield Example(captions[file], (ImageRef(file),), (score,), f"{root.name}/{side}/{stem}")

    used = {*found, *(caption for caption in found.values() if caption)}
    total = min(len(files), config.limit or len(files))
    return Preferences(config.path, rows, total, None, schema="folder of likes", notes=_left(root, used))


def read_caption(file: Path) -> str:
    """Return the text of a caption's file, stripped; UserError naming one that is not UTF-8."""
    return read_text(file).strip()


def _left(root: Path, used: Iterable[Path]) -> list[str]:
    """Return a note on the files of a folder that are not used, by kind; [] where all are."""
    known = set(used)
    rest = [
        file
        for file in sorted(root.rglob("*"))
        if file.is_file() and file not in known and not _hidden(file, root)
    ]
    media = [file for file in rest if file.suffix.lower() in IMAGES | VIDEOS]
    others = [file for file in rest if file not in set(media)]
    named = [(media, "images or videos"), (others, "other files")]
    shown = lambda files: some([str(file.relative_to(root)) for file in files])  # noqa: E731
    return [f"{len(files)} {what} not used: {shown(files)}" for files, what in named if files]


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)


def _pairs(root: Path, videos: bool) -> dict[str, tuple[Path, Path, Path]]:
    """Return (winner, loser, caption) by stem."""
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
            what = f"neither _w nor _l ends the name of {some(strays)}" if strays else _none(videos, "it")
            raise UserError(
                f"{root}: {what}; needed w/ and l/ (or chosen/ and rejected/, win/ and lose/) "
                f"with equal names, or NAME_w and NAME_l"
            )
        winners = {stem[:-2]: file for stem, file in files.items() if stem.endswith("_w")}
        losers = {stem[:-2]: file for stem, file in files.items() if stem.endswith("_l")}
        names = ("NAME_w", "NAME_l")
    for here, there, name in ((winners, losers, names[1]), (losers, winners, names[0])):
        alone = sorted(here.keys() - there.keys())
        if alone:
            raise UserError(
                f"{root}: no rival in {name} for {some([here[stem].name for stem in alone])}; "
                f"every one needs one on the other side"
            )
    captions = {stem: _caption(root, stem, winners[stem], losers[stem]) for stem in winners}
    _all_captioned(root, captions)
    return {stem: (winners[stem], losers[stem], caption) for stem, caption in captions.items() if caption}


def _none(videos: bool, place: str) -> str:
    return f"no videos in {place}" if videos else f"no images in {place} (videos need data.frames)"


def _files(folder: Path, videos: bool) -> dict[str, Path]:
    """Return image or video files by stem, without hidden ones."""
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else []:
        if file.suffix.lower() not in (VIDEOS if videos else IMAGES) or file.name.startswith("."):
            continue
        if file.stem in found:
            raise UserError(
                f"{folder}: {found[file.stem].name} and {file.name} have the same name; which one is meant?"
            )
        found[file.stem] = file
    return found


def _caption(root: Path, stem: str, *images: Path) -> Path | None:
    return next(iter(_caption_places(root, stem, *images)), None)


def _caption_places(root: Path, stem: str, *images: Path) -> list[Path]:
    """Return the captions of a pair or an image, the one that counts first."""
    beside = [image.with_suffix("") for image in images]
    places = [place.with_name(place.name + end) for place in (*beside, root / stem) for end in CAPTIONS]
    return [place for place in dict.fromkeys(places) if place.is_file()]


def _all_captioned(root: Path, captions: Mapping[str, Path | None]) -> None:
    missing = sorted(stem for stem, caption in captions.items() if caption is None)
    if missing:
        name = missing[0].rpartition("/")[2]
        near = {
            file.name
            for file in root.rglob(f"{escape(name)}.*")
            if file.suffix.lower() not in IMAGES | VIDEOS and not _hidden(file, root)
        }
        told = f" (found is {some(sorted(near))})" if near else ""
        raise UserError(
            f"{root}: no caption for {some(missing)}{told}; needed {missing[0]}.txt beside it or in the "
            f"folder; allowed suffixes: {', '.join(CAPTIONS)}"
        )
