"""Prompts with a source image: edit instructions, or texts that guide a continuation of the image."""

from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.media.images import UNREADABLE, decode, read_file, why_unreadable


class SourcedPrompt(str):
    """A prompt with a source image; as a ``str`` it passes wherever prompts pass.

    Two are equal if their texts and images are equal, and none equals a plain string. So code that counts,
    seeds or caches by prompt does so by prompt and source.
    """

    source: bytes | Path

    def __new__(cls, text: str, source: bytes | Path) -> "SourcedPrompt":
        """Return the prompt ``text`` for a source image, given as a path or as encoded bytes."""
        prompt = super().__new__(cls, text)
        prompt.source = source
        return prompt

    @cached_property
    def content(self) -> bytes:
        """The encoded image; UserError if the file cannot be read."""
        if isinstance(self.source, bytes):
            return self.source
        try:
            return read_file(self.source)
        except OSError as error:
            raise UserError(f"source image {str(self.source)!r}: {why_unreadable(error)}") from error

    @cached_property
    def digest(self) -> str:
        """A digest of the encoded image."""
        return blake2b(self.content, digest_size=16).hexdigest()

    @property
    def image(self) -> Image.Image:
        """The image in RGB; UserError if it cannot be decoded."""
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
        """Pickle as text and source."""
        return SourcedPrompt, (str(self), self.source)


def reworded(prompt: str, text: str) -> str:
    """Return ``text`` in the place of a prompt: with its source image if it has one."""
    return SourcedPrompt(text, prompt.source) if isinstance(prompt, SourcedPrompt) else text


def sources_of(prompts: Iterable[str]) -> list[SourcedPrompt]:
    """Return the prompts with a source: all of them, or none.

    Raises:
        UserError: some prompts have a source and others have none.
    """
    prompts = list(prompts)
    sourced = [prompt for prompt in prompts if isinstance(prompt, SourcedPrompt)]
    if sourced and len(sourced) < len(prompts):
        without = next(prompt for prompt in prompts if not isinstance(prompt, SourcedPrompt))
        raise UserError(
            f"{len(sourced)} of {len(prompts)} prompts have a source image, and {without!r} has none; "
            "allowed: a source for each, or none"
        )
    return sourced
