"""Prompts about a source image: an instruction to edit it, or a text by which to continue it."""

from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.media.images import UNREADABLE, decode, read_file, why_unreadable


class SourcedPrompt(str):
    """A prompt that knows its source image; wherever prompts go, it goes with them.

    Two are equal where text and image are, and none is equal to a plain text: what is counted, seeded or
    remembered by prompt is so by prompt and source.
    """

    source: bytes | Path

    def __new__(cls, text: str, source: bytes | Path) -> "SourcedPrompt":
        """Return the prompt ``text`` about the image in a file, or in encoded bytes."""
        made = super().__new__(cls, text)
        made.source = source
        return made

    @cached_property
    def content(self) -> bytes:
        """The bytes of the image; UserError where the file cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return read_file(self.source)
        except OSError as error:
            raise UserError(f"source image {str(self.source)!r}: {why_unreadable(error)}") from error

    @cached_property
    def digest(self) -> str:
        """What tells its image from others."""
        return blake2b(self.content, digest_size=16).hexdigest()

    @property
    def image(self) -> Image.Image:
        """The image, RGB; UserError where it cannot be read."""
        try:
            return decode(self.content)
        except UNREADABLE as error:
            name = "bytes" if isinstance(self.source, bytes) else str(self.source)
            raise UserError(f"source image {name!r}: {why_unreadable(error)}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SourcedPrompt) and str(self) == str(other) and self.digest == other.digest

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((str(self), self.digest))

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: text and source."""
        return SourcedPrompt, (str(self), self.source)


def sources_of(prompts: Iterable[str]) -> list[SourcedPrompt]:
    """Return the prompts that have a source.

    Raises:
        UserError: some have and some have not.
    """
    prompts = list(prompts)
    found = [prompt for prompt in prompts if isinstance(prompt, SourcedPrompt)]
    if found and len(found) < len(prompts):
        plain = next(prompt for prompt in prompts if not isinstance(prompt, SourcedPrompt))
        raise UserError(
            f"{len(found)} of {len(prompts)} prompts have a source image, and {plain!r} has none; allowed: a "
            "source for each, or none"
        )
    return found
