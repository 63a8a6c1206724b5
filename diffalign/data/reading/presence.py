"""The files that a set names, looked for before a model is loaded: are they there, are they images?

Every local path is looked for; headers are read of the first ``HEADERS`` files, or of the first ``LOOKED_AT``
rows where the rows hold the bytes of files themselves. What is elsewhere (addresses) is not fetched.
"""

import os
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

from diffalign.config.schema import DataConfig
from diffalign.data.reading.examples import Example, ImageRef, Preferences
from diffalign.data.reading.splits import some
from diffalign.errors import UserError
from diffalign.media.images import UNREADABLE, opened, read_file, why_unreadable

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
        UserError: none of the first files is there (it is the paths that are wrong, not a file), or
            ``config.unreadable`` is "refuse" and a file is missing or unreadable.
    """
    rows = (row for row in preferences.unfinished() if isinstance(row, Example))
    first = list(islice(rows, LOOKED_AT))
    named = [image for row in first for image in row.images if isinstance(image.source, Path)]
    if named and not any(_is_there(image) for image in named):
        where = " or ".join(str(place) for place in (named[0].source, *named[0].others))
        raise UserError(
            f"data.path {preferences.name!r}: none of the first {len(named)} files was found; "
            f"looked for {where} ({named[0].root})"
        )
    every = chain(first, rows) if named else iter(first)
    found = _Found(headers=config.frames is None)
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


class _Found:
    """What has been looked at so far."""

    def __init__(self, headers: bool):
        self.headers = HEADERS if headers else 0
        self.seen = 0
        self.bad: dict[str, None] = {}

    def add(self, row: Example) -> None:
        for at, image in enumerate(row.images):
            if not isinstance(image.source, Path | bytes):
                continue
            self.seen += 1
            if why := self._wrong(image):
                self.bad[f"{image.name or f'{row.where} image {at}'} ({why})"] = None

    def _wrong(self, image: ImageRef) -> str:
        """Return why a file cannot be used; empty where it can, as far as it was looked at."""
        if not _is_there(image):
            return "not there"
        if not self.headers:
            return ""
        self.headers -= 1
        try:
            file = image.file
            with opened(file if isinstance(file, bytes) else read_file(file)):
                return ""
        except UNREADABLE as error:
            return why_unreadable(error)


def _is_there(image: ImageRef) -> bool:
    """Whether there is a regular file where an image is looked for."""
    return not isinstance(image.source, Path) or any(map(os.path.isfile, (image.source, *image.others)))
