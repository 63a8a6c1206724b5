"""Rows of tables: which columns hold the prompt, the images and the label, in the schemas that people
publish.

- Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569): ``caption, jpg_0, jpg_1, label_0, label_1, has_label``;
  labels are 1 / 0, or 0.5 / 0.5 for a tie. Without label columns ``best_image_uid`` against ``image_0_uid,
  image_1_uid`` is read ("tie" is a tie).
- ``prompt, chosen, rejected``: trl's names.
- ``prompt, path1, path2``: HPDv3's names, path1 is preferred.
- ``prompt, images, scores``: a ranked list, as many scores as images.
- ``prompt, image, liked``: a single like or dislike.
- ``prompt, video_0, video_1, label_0, label_1``; ``prompt, videos`` with ``scores`` or dense labels,
  ``segments`` (per video as many scores as segments) and ``segment_seconds``; ``prompt, video, liked``: the
  same of videos. The schemas of images that say nothing of their kind may hold videos.
- ``prompt, altered, image``: an image, its caption, and a caption that is wrong of it.
- ``prompt, image``: where nothing but a caption is needed (``plain``).

Any of them may have ``rewards`` (per image a number, or a list of them), ``patches`` (per image the file of a
weight map) and ``weight`` (of the group). A row is recognised by its columns, not by the file that it came
from.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffalign.data.reading.dense import overall, read_seconds, read_segments
from diffalign.data.reading.examples import Example, ImageRef, Skipped
from diffalign.errors import UserError

PROMPTS = ("caption", "prompt")
PAIRED = (("jpg_0", "jpg_1"), ("video_0", "video_1"))
VIDEOS = ("video_0", "videos", "video")
ORDERED = (("chosen", "rejected"), ("path1", "path2"))
LABELS = ("label_0", "label_1")
UIDS = ("best_image_uid", "image_0_uid", "image_1_uid")
EXTRAS = ("rewards", "patches", "weight", "segments", "segment_seconds")
Labels = Literal["ordered", "scores", "uid", "list", "like", "altered", "plain"]
_COLUMNS: Mapping[Labels, tuple[str, ...]] = {
    "ordered": (),
    "scores": LABELS,
    "uid": UIDS,
    "list": ("scores",),
    "like": ("liked",),
    "altered": ("altered",),
    "plain": (),
}


@dataclass(frozen=True)
class Schema:
    """Which columns are what.

    Attributes:
        prompt: the prompt's column.
        images: the images' columns; of a list the one column that holds them all.
        labels: "ordered" (the first is better), "scores" (label_0, label_1), "uid" (best_image_uid), "list",
            "like", "altered" or "plain".
        flag: the column that says whether there is a label, if there is one.
        extras: which further columns there are: rewards, patches, weight, segments, segment_seconds.
        rated: a row without a label is kept, since rewards will score it.
        scored: whether a list has its column of scores.
    """

    prompt: str
    images: tuple[str, ...]
    labels: Labels
    flag: str | None = None
    extras: tuple[str, ...] = ()
    rated: bool = False
    scored: bool = True

    @property
    def videos(self) -> bool:
        """Whether the columns say that they hold videos."""
        return self.images[0] in VIDEOS

    @property
    def columns(self) -> list[str]:
        """The columns to read; the others may be large."""
        labels = _COLUMNS[self.labels] if self.scored else ()
        return [self.prompt, *self.images, *labels, *([self.flag] if self.flag else []), *self.extras]


def schema_of(columns: Collection[str], place: str, plain: bool = False, rated: bool = False) -> Schema:
    """The schema that these columns follow; UserError naming the columns found and needed.

    ``plain``: an image and a prompt are enough. ``rated``: a list needs no scores, rewards will give them.
    """
    prompt = next((name for name in PROMPTS if name in columns), None)
    there = lambda *names: all(name in columns for name in names)  # noqa: E731
    found = next((kind for kind in _kinds(plain, rated) if there(*kind[0], *kind[1])), None)
    if prompt and found:
        images, _, labels = found
        flag = "has_label" if images in PAIRED and there("has_label") else None
        extras = tuple(name for name in EXTRAS if name in columns)
        scored = labels != "list" or there("scores")
        return Schema(prompt, images, labels, flag, extras, rated, scored)
    raise UserError(
        f"{place}: no preference columns; found {', '.join(sorted(columns)) or 'none'}; "
        f"needed caption (or prompt) with jpg_0, jpg_1, label_0, label_1 (or best_image_uid, image_0_uid, "
        f"image_1_uid), or with chosen, rejected, or with path1 (preferred), path2, or with images, scores, "
        f"or with image, liked, or with image, altered{', or with image' if plain else ''}; "
        f"of videos video_0, video_1, label_0, label_1, or videos with scores or segments, or video, liked"
    )


def _kinds(plain: bool, rated: bool) -> list[tuple[tuple[str, ...], tuple[str, ...], Labels]]:
    """(image columns, label columns, kind), the first that is there counts."""
    kinds: list[tuple[tuple[str, ...], tuple[str, ...], Labels]] = [
        *((pair, LABELS, "scores") for pair in PAIRED),  # type: ignore[list-item]
        (PAIRED[0], UIDS, "uid"),
        *((pair, (), "ordered") for pair in ORDERED),  # type: ignore[list-item]
    ]
    for many, one in (("images", "image"), ("videos", "video")):
        kinds += [
            ((many,), () if rated else ("scores",), "list"),
            ((many,), ("segments",), "list"),
            ((one,), ("liked",), "like"),
            ((one,), ("altered",), "altered"),
        ]
    return [*kinds, (("image",), (), "plain"), (("video",), (), "plain")] if plain else kinds


def read_row(
    row: Mapping[str, Any], schema: Schema, where: str, image: Callable[[Any, str], ImageRef | None]
) -> Example | Skipped:
    """One row as an example, or why there is none.

    ``image(value, place)`` makes an image of a column's value, None if there is none in it. Raises UserError
    for a label, reward or weight that is none.
    """
    scores = _scores(row, schema, where)
    if scores is None and not schema.rated and row.get("segments") is None:
        return Skipped("no label", where, "unlabelled")
    prompt = row[schema.prompt]
    if not isinstance(prompt, str):
        return Skipped(f"no text in column {schema.prompt!r}", where)
    values = _images(row, schema, where, scores)
    if values is None:
        return Skipped(f"no image in column {schema.images[0]!r}", where)
    images = []
    for name, value in values:
        reference = image(value, f"{where}, column {name!r}")
        if reference is None:
            return Skipped(f"no image in column {name!r}", where)
        images.append(reference)
    prompts: tuple[str, ...] = ()
    if schema.labels == "altered":
        if not isinstance(row["altered"], str):
            return Skipped("no text in column 'altered'", where)
        images, prompts = images * 2, (prompt, row["altered"])
    segments = read_segments(row.get("segments"), where, len(images))
    scores = scores or (overall(segments) if segments else None)
    if scores is None and not schema.rated:
        return Skipped("no label", where, "unlabelled")
    return Example(
        prompt,
        tuple(images),
        scores or (),
        where,
        prompts,
        _rewards(row, schema, where, len(images)),
        _patches(row, schema, where, len(images), image),
        _weight(row, schema, where),
        segments=segments,
        segment_seconds=read_seconds(row.get("segment_seconds"), where),
    )


def _images(
    row: Mapping[str, Any], schema: Schema, where: str, scores: tuple[float, ...] | None
) -> list[tuple[str, Any]] | None:
    """(column, value) of each image; None where a list's column is empty."""
    if schema.labels != "list":
        return [(name, row[name]) for name in schema.images]
    (name,) = schema.images
    values = row[name]
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str | bytes) or len(values) < 2:
        raise UserError(f"{where}: {name} is {str(values)[:60]}; allowed: a list of two or more")
    if scores is not None and len(scores) != len(values):
        raise UserError(
            f"{where}: {len(scores)} scores for {len(values)} {name}; allowed: one score an {name[:-1]}"
        )
    return [(name, value) for value in values]


def _scores(row: Mapping[str, Any], schema: Schema, where: str) -> tuple[float, ...] | None:
    """The label as scores; None if there is none."""
    if schema.labels in ("ordered", "altered"):
        return 1.0, 0.0
    if schema.labels == "plain":
        return (1.0,)
    if schema.labels == "like":
        return _like(row["liked"], where)
    if schema.labels == "list":
        return _ranked(row["scores"] if schema.scored else None, where)
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


def _like(value: Any, where: str) -> tuple[float] | None:
    if value is None:
        return None
    if value not in (True, False):  # 1 and 0 are equal to them
        raise UserError(
            f"{where}: liked is {value!r}; allowed: true, false, or nothing where it is not known"
        )
    return (float(value),)


def _ranked(value: Any, where: str) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise UserError(f"{where}: scores is {str(value)[:60]}; allowed: a list of numbers, one an image")
    scores = tuple(_number(score, "a score", where) for score in value)
    return None if any(map(math.isnan, scores)) else scores


def _rewards(
    row: Mapping[str, Any], schema: Schema, where: str, images: int
) -> tuple[tuple[float, ...], ...]:
    """One tuple of numbers an image, or none at all."""
    value = row["rewards"] if "rewards" in schema.extras else None
    if value is None:
        return ()
    each = list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
    if len(each) != images and images == 1:  # several rewards of one image need no second pair of brackets
        each = [each]
    rows = [tuple(one) if isinstance(one, list | tuple) else (one,) for one in each]
    sizes = {len(one) for one in rows}
    numbers = all(isinstance(n, int | float) and math.isfinite(n) for one in rows for n in one)
    if len(rows) != images or len(sizes) != 1 or not numbers or 0 in sizes:
        raise UserError(
            f"{where}: rewards is {str(value)[:60]}; allowed: for each of the {images} images a number, or "
            f"equally long lists of numbers"
        )
    return tuple(tuple(float(n) for n in one) for one in rows)


def _patches(
    row: Mapping[str, Any],
    schema: Schema,
    where: str,
    images: int,
    image: Callable[[Any, str], ImageRef | None],
) -> tuple[ImageRef | None, ...]:
    value = row["patches"] if "patches" in schema.extras else None
    if value is None:
        return ()
    each = list(value) if isinstance(value, list | tuple) else [value]
    if len(each) != images:
        raise UserError(f"{where}: {len(each)} patches for {images} images; allowed: a map or null for each")
    return tuple(image(one, f"{where}, column 'patches'") for one in each)


def _weight(row: Mapping[str, Any], schema: Schema, where: str) -> float:
    value = row["weight"] if "weight" in schema.extras else None
    if value is None:
        return 1.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise UserError(f"{where}: weight is {value!r}; allowed: a number from 0 on")
    return float(value)


def _number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {name} is {value!r}; a label is a number (1, 0, or 0.5 twice for a tie) or empty"
        ) from error
