"""Rows of tables: which columns hold the prompt, the images and the label, in the schemas that people
publish.

- Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): ``caption, jpg_0, jpg_1, label_0, label_1, has_label``;
  labels are 1 / 0, or 0.5 / 0.5 for a tie. Without label columns ``best_image_uid`` against ``image_0_uid,
  image_1_uid`` is read ("tie" is a tie).
- ``prompt, chosen, rejected``: trl's names.
- ``prompt, path1, path2``: HPDv3's names, path1 is preferred.

A row is recognised by its columns, not by the file that it came from.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from diffalign.data.examples import Example, ImageRef, Skipped
from diffalign.errors import UserError

PROMPTS = ("caption", "prompt")
ORDERED = (("chosen", "rejected"), ("path1", "path2"))
LABELS = ("label_0", "label_1")
UIDS = ("best_image_uid", "image_0_uid", "image_1_uid")


@dataclass(frozen=True)
class Schema:
    """Which columns are what.

    Attributes:
        prompt: the prompt's column.
        images: the two images' columns.
        labels: "ordered" (the first is better), "scores" (label_0, label_1) or "uid" (best_image_uid).
        flag: the column that says whether there is a label, if there is one.
    """

    prompt: str
    images: tuple[str, str]
    labels: str
    flag: str | None = None

    @property
    def columns(self) -> list[str]:
        """The columns to read; the others may be large."""
        labels = {"ordered": (), "scores": LABELS, "uid": UIDS}[self.labels]
        return [self.prompt, *self.images, *labels, *([self.flag] if self.flag else [])]


def schema_of(columns: Collection[str], place: str) -> Schema:
    """The schema that these columns follow; UserError naming the columns found and needed."""
    prompt = next((name for name in PROMPTS if name in columns), None)
    ordered = next((pair for pair in ORDERED if all(name in columns for name in pair)), None)
    pick = all(name in columns for name in ("jpg_0", "jpg_1"))
    labels = next(
        (kind for kind, names in (("scores", LABELS), ("uid", UIDS)) if all(n in columns for n in names)),
        None,
    )
    if prompt and pick and labels:
        return Schema(prompt, ("jpg_0", "jpg_1"), labels, "has_label" if "has_label" in columns else None)
    if prompt and ordered:
        return Schema(prompt, ordered, "ordered")
    raise UserError(
        f"{place}: no preference columns; found {', '.join(sorted(columns)) or 'none'}; "
        f"needed caption (or prompt) with jpg_0, jpg_1, label_0, label_1 (or best_image_uid, image_0_uid, "
        f"image_1_uid), or with chosen, rejected, or with path1 (preferred), path2"
    )


def read_row(
    row: Mapping[str, Any], schema: Schema, where: str, image: Callable[[Any, str], ImageRef | None]
) -> Example | Skipped:
    """One row as an example, or why there is none.

    ``image(value, place)`` makes an image of a column's value, None if there is none in it. Raises UserError
    for a label that is no number.
    """
    scores = _scores(row, schema, where)
    if scores is None:
        return Skipped("no label", where, unlabelled=True)
    prompt = row[schema.prompt]
    if not isinstance(prompt, str):
        return Skipped(f"no text in column {schema.prompt!r}", where)
    images = []
    for name in schema.images:
        reference = image(row[name], f"{where}, column {name!r}")
        if reference is None:
            return Skipped(f"no image in column {name!r}", where)
        images.append(reference)
    return Example(prompt, tuple(images), scores, where)


def _scores(row: Mapping[str, Any], schema: Schema, where: str) -> tuple[float, float] | None:
    if schema.labels == "ordered":
        return 1.0, 0.0
    if schema.flag and row[schema.flag] is not None and not row[schema.flag]:
        return None
    if schema.labels == "uid":
        best, first, second = (row[name] for name in UIDS)
        return {first: (1.0, 0.0), second: (0.0, 1.0), "tie": (0.5, 0.5)}.get(best) if best else None
    first, second = (_number(row[name], name, where) for name in LABELS)
    # 0 / 0 is how Pick-a-Pic writes "not judged"; a judged tie is 0.5 / 0.5
    if math.isnan(first) or math.isnan(second) or first == second == 0:
        return None
    return (0.5, 0.5) if first == second else (first, second)


def _number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {name} is {value!r}; a label is a number (1, 0, or 0.5 twice for a tie) or empty"
        ) from error
