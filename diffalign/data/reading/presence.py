"""The files that a set names, looked for before a model is loaded: are they there, are they images?

These are the images or videos of each row, its source image and its weight maps. Every local path is looked
for; headers are read of the first ``HEADERS`` files, or of the first ``LOOKED_AT``
rows where the rows hold the bytes of files themselves. What is elsewhere (addresses) is not fetched.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.patches import NUMPY, read_map
from diffalign.data.reading.examples import Example, ImageRef, Preferences
from diffalign.data.reading.splits import some
from diffalign.errors import UserError
from diffalign.media.images import IMAGE_SUFFIXES, UNREADABLE, opened, read_file, why_unreadable
from diffalign.media.videos import probe

LOOKED_AT = 32
"""Rows that tell whether a set names files, and whether its paths are right at all."""
HEADERS = 4096
"""Files whose headers are read, at most."""


def check_files(
    preferences: Preferences, config: DataConfig, tell: Callable[[str], None] | None = None
) -> None:
    """Look for the files that a set names, before anything long begins.

    Args:
        preferences: the set.
        config: its settings; ``config.unreadable`` says whether what is missing is an error.
        tell: gets a line with the number of files that are missing or unreadable, and the first of them.

    Raises:
        UserError: none of the first files is there (it is the paths that are wrong, not a file), one of them
            is an image where ``config.frames`` says that the set is of videos, or ``config.unreadable`` is
            "refuse" and a file is missing or unreadable.
    """
    rows = (row for row in preferences.unfinished() if isinstance(row, Example))
    first = list(islice(rows, LOOKED_AT))
    paths = False
    for what, of in _KINDS.items():
        named = [image for row in first for image in of(row) if isinstance(image.source, Path)]
        paths = paths or bool(named)
        if named and not any(_is_there(image) for image in named):
            where = " or ".join(str(place) for place in (named[0].source, *named[0].others))
            raise UserError(
                f"data.path {preferences.name!r}: none of the first {len(named)} {what} was found; "
                f"looked for {where} ({named[0].root})"
            )
    if config.frames is not None and (
        still := next(filter(_is_still, chain(*(r.images for r in first))), None)
    ):
        raise UserError(
            f"data.path {preferences.name!r} is read as a set of videos, and {still.name} is an image; "
            "allowed: files of videos, or to read it as images (data.frames null, no --videos)"
        )
    every = chain(first, rows) if paths else iter(first)
    found = _Found(videos=config.frames is not None)
    for row in every:
        found.add(row)
    if not found.bad:
        return
    message = (
        f"data.path {preferences.name!r}: {len(found.bad)} of {found.seen} files missing or unreadable: "
        f"{some(list(found.bad))}"
    )
    if config.unreadable == "refuse":
        raise UserError(f"{message}; data.unreadable is refuse, allowed: skip, which leaves their rows out")
    if tell:
        tell(f"warning: {message}; their rows will be left out (data.unreadable skip)")


_KINDS: Mapping[str, Callable[[Example], Sequence[ImageRef]]] = {
    "files": lambda row: row.images,
    "source images": lambda row: () if row.source is None else (row.source,),
    "weight maps": lambda row: [each for each in row.patches if each is not None],
}
"""The files of a row, by what messages call them."""


class _Found:
    """What has been looked at so far."""

    def __init__(self, videos: bool):
        self.videos = videos
        self.headers = HEADERS
        self.seen = 0
        self.bad: dict[str, None] = {}

    def add(self, row: Example) -> None:
        for at, image in enumerate(row.images):
            self._look(image, f"{row.where} image {at}", None if self.videos else _check_image)
        if row.source is not None:
            self._look(row.source, f"{row.where} source", _check_image)
        for at, weights in enumerate(row.patches):
            if weights is not None:
                self._look(weights, f"{row.where} map {at}", _check_map)

    def _look(self, image: ImageRef, place: str, header: Callable[[bytes], None] | None) -> None:
        """Count a file, and name it where it is missing or ``header`` raises on its content."""
        if not isinstance(image.source, Path | bytes):
            return
        self.seen += 1
        if why := self._wrong(image, header):
            self.bad[f"{image.name or place} ({why})"] = None

    def _wrong(self, image: ImageRef, header: Callable[[bytes], None] | None) -> str:
        """Return why a file cannot be used; empty where it can, as far as it was looked at."""
        if not _is_there(image):
            return "not there"
        if header is None or not self.headers:
            return ""
        self.headers -= 1
        try:
            file = image.file
            header(file if isinstance(file, bytes) else read_file(file))
            return ""
        except UNREADABLE as error:
            return why_unreadable(error)


def _check_image(content: bytes) -> None:
    """Raise one of ``UNREADABLE`` where a file does not begin as an image."""
    with opened(content):
        pass


def _check_map(content: bytes) -> None:
    """Raise one of ``UNREADABLE`` where a file is no weight map: an array, or an image by its beginning."""
    if content.startswith(NUMPY):
        read_map(content)
    else:
        _check_image(content)


def _is_still(image: ImageRef) -> bool:
    """Whether a file that has the name of an image holds no video, as animated ones do."""
    if not image.name.lower().endswith(IMAGE_SUFFIXES) or not _is_there(image):
        return False
    try:
        probe(image.file)
    except (UserError, OSError):
        return True
    return False


def _is_there(image: ImageRef) -> bool:
    """Whether there is a regular file where an image is looked for."""
    return not isinstance(image.source, Path) or any(map(os.path.isfile, (image.source, *image.others)))
