"""Columns of an image that is edited or continued, told by their names and by what they hold."""

import re
from collections.abc import Mapping
from typing import Any

from diffalign.data.reading.cells import cell
from diffalign.data.reading.examples import ImageRef, Skipped
from diffalign.data.reading.extras import Opener
from diffalign.data.reading.layout import Layout
from diffalign.errors import UserError
from diffalign.media.images import IMAGE_SUFFIXES
from diffalign.media.videos import VIDEO_SUFFIXES

SOURCES = (
    "path_src", "input_image_raw", "source_image", "src_image", "image_src", "source_img", "src_img",
    "input_image", "original_image",
    "condition_image", "conditioning_image", "control_image", "reference_image", "init_image", "prompt_asset",
    "source_video", "input_video", "first_frame",
)  # fmt: skip
"""Columns of an image that is edited or continued: the source of a row."""

SOURCE = "source"
"""The role of the source."""

SOURCE_WORDS = frozenset({
    "src", "source", "input", "original", "init", "condition", "conditioning", "control", "controlnet",
    "reference", "references", "ref", "mask", "masked", "edited", "start",
})  # fmt: skip
"""Words in the names of such columns; they count only where the column holds files. ``mask`` is among
them so that a mask of another name than the role's is refused, and not left unused."""
_MEDIA = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)


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
        if name not in names and names_a_source(name) and _holds_files(value)
    ]


def holds_no_image(name: str, found: Mapping[str, Any]) -> bool:
    """Whether a column of ``source_columns`` holds a mask, by its name, or videos, by its name or by the path
    in a cell.
    """
    value = found.get(name)
    value = value.get("path") if isinstance(value, Mapping) else value
    of_video = "video" in name or (isinstance(value, str) and value.lower().endswith(VIDEO_SUFFIXES))
    return of_video or "mask" in name.lower()


def names_a_source(name: str) -> bool:
    """Whether a column's name says that images were made from what it holds."""
    return name in SOURCES or not SOURCE_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def _holds_files(value: Any) -> bool:
    """Whether a cell, or the prototype of one, is the bytes or the path of images or videos."""
    if isinstance(value, Mapping):
        return _holds_files(value.get("bytes")) or _holds_files(value.get("path"))
    if isinstance(value, list | tuple):
        return any(map(_holds_files, value[:1]))
    return isinstance(value, bytes) or (isinstance(value, str) and value.lower().endswith(_MEDIA))


def source_column(layout: Layout, named: Mapping[str, Any], place: str) -> str:
    """Return the column of the image that the rivals were made from, or the path to it; "": there is none.

    Raises:
        UserError: several columns may be it, or it is a video.
    """
    schema = layout.schema
    if SOURCE in dict(layout.mapped):
        return SOURCE
    if schema.inputs and cell(named, f"{schema.inputs}.0.path") is not None:
        return f"{schema.inputs}.0.path"
    rivals = len(schema.files.columns) > 1 or schema.files.columns[0] in ("images", "videos")
    taken = ({path for _, path in layout.mapped} | layout.used) - set(schema.needs)
    found = [name for name in source_columns(layout.found, rivals) if name not in taken]
    if refused := [name for name in found if holds_no_image(name, layout.found)]:
        raise UserError(
            f"{place}: column {refused[0]!r} holds a video or a mask beside the prompt; allowed: one source "
            f"image (if {refused[0]!r} is no input, leave it out of the table, or name the source: "
            "data.columns source=COLUMN)"
        )
    if len(found) > 1:
        raise UserError(
            f"{place}: columns {' and '.join(map(repr, found))} may hold the source image, an input beside "
            f"the prompt; name one: data.columns source={found[0]}"
        )
    return found[0] if found else ""


def source_image(
    layout: Layout, row: Mapping[str, Any], where: str, image: Opener
) -> ImageRef | Skipped | None:
    """Return the source of a row, or why there is none; None where rows have none.

    Raises:
        UserError: several inputs, or what is no image.
    """
    column = layout.schema.inputs or layout.source
    value = cell(row, column)
    inputs = value if isinstance(value, list | tuple) else [value] if layout.source else []
    if len(inputs) > 1 or (inputs and not layout.source):
        raise UserError(
            f"{where}: {column} holds {len(inputs)} inputs beside the prompt; allowed: one source image"
        )
    if not layout.source:
        return None
    one = cell(row, layout.source) if layout.schema.inputs else inputs[0] if inputs else None
    reference = image(one, f"{where}, column {layout.source!r}")
    return Skipped(f"no image in column {layout.source!r}", where) if reference is None else reference
