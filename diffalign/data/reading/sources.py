"""Columns of an image that is edited or continued, told by their names and by what they hold."""

import re
from collections.abc import Mapping
from typing import Any

from diffalign.data.reading.folders import IMAGES
from diffalign.media.videos import VIDEO_SUFFIXES

SOURCES = (
    "path_src", "source_image", "src_image", "image_src", "source_img", "src_img", "input_image",
    "original_image",
    "condition_image", "conditioning_image", "control_image", "reference_image", "init_image", "prompt_asset",
    "source_video", "input_video", "first_frame",
)  # fmt: skip
"""Columns of an image that is edited or continued: data of conditional generation."""
SOURCE_WORDS = frozenset({
    "src", "source", "input", "original", "init", "condition", "conditioning", "control", "controlnet",
    "reference", "references", "ref", "mask", "masked", "edited", "start",
})  # fmt: skip
"""Words in the names of such columns; they count only where the column holds files."""
_MEDIA = (*IMAGES, *VIDEO_SUFFIXES)


def source_columns(found: Mapping[str, Any], rivals: bool) -> list[str]:
    """Return the columns that hold what the images of a row were made from.

    Args:
        found: all columns, with a cell or the prototype of one.
        rivals: whether other columns hold the images, so that one called ``image`` is no rival.
    """
    names = [*SOURCES, *(("image", "images", "video") if rivals else ())]
    return [name for name in names if name in found] + [
        name
        for name, value in found.items()
        if name not in names and _names_a_source(name) and _holds_files(value)
    ]


def _names_a_source(name: str) -> bool:
    """Whether a column's name says that images were made from what it holds."""
    return not SOURCE_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _holds_files(value: Any) -> bool:
    """Whether a cell, or the prototype of one, is the bytes or the path of images or videos."""
    if isinstance(value, Mapping):
        return _holds_files(value.get("bytes")) or _holds_files(value.get("path"))
    if isinstance(value, list | tuple):
        return any(map(_holds_files, value[:1]))
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(_MEDIA))
