"""Rows of tables to examples, by the schema of their columns (``schemas.SCHEMAS``).

``data.columns`` maps roles to columns (``prompt=caption``); roles are the column names of our own schemas,
and a mapped column has precedence over one of that name. A column that holds an input besides the prompt is
the source of its row, an image that is edited or continued: the model that trains on the row must take it.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from diffalign.data.reading.cells import Verdict, cell, truth
from diffalign.data.reading.dense import overall, read_seconds, read_segments
from diffalign.data.reading.examples import Example, ImageRef, Skipped
from diffalign.data.reading.extras import Opener, read_maps, read_rewards, read_time_labels, read_weight
from diffalign.data.reading.labels import Checklist, Choice, Label, Rating
from diffalign.data.reading.layout import Layout
from diffalign.data.reading.schemas import PROMPTS, SCHEMAS, Schema
from diffalign.data.reading.sources import SOURCE, source_column, source_image
from diffalign.errors import UserError, close_to, unknown

ROLES = (
    "prompt", "chosen", "rejected", "image", "images", "image_0", "image_1", "video", "videos", "video_0",
    "video_1", "label", "label_0", "label_1", "has_label", "scores", "ranks", "votes", "votes_0", "votes_1",
    "confidence", "liked", "altered", "rewards", "patches", "mask", "time_labels", "weight",
    "segments", "segment_seconds", "are_different", SOURCE,
)  # fmt: skip


def mapping_of(columns: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Return (role, column) of ``data.columns``; UserError for another form or an unknown role."""
    pairs = []
    for text in columns:
        role, equals, name = (part.strip() for part in text.partition("="))
        if not equals or not name:
            raise UserError(f"data.columns: {text!r}; allowed: role=column, such as prompt=caption")
        if role not in ROLES:
            raise unknown("role of data.columns", role, ROLES)
        pairs.append((role, name))
    return tuple(pairs)


def schema_of(
    columns: Collection[str] | Mapping[str, Any],
    place: str,
    plain: bool = False,
    rated: bool = False,
    mapped: Sequence[tuple[str, str]] = (),
    label: str = "",
) -> Layout:
    """Return the layout of these columns.

    Args:
        columns: their names, or a row or prototypes of one by name, where nested fields can be seen.
        place: for messages.
        plain: an image and a prompt are enough.
        rated: a list needs no scores, since rewards give them.
        mapped: (role, column).
        label: ``data.label``: which of several labels.

    Raises:
        UserError: no schema fits (it names the columns found and needed), a mapped column is missing, or it
            cannot be told which column is the source.
    """
    found = dict(columns) if isinstance(columns, Mapping) else dict.fromkeys(columns, None)
    for role, path in mapped:
        if not _has(found, path):
            close = close_to(path, found)
            hint = f"; did you mean {' or '.join(close)}?" if close else ";"
            raise UserError(
                f"{place}: data.columns {role}={path}: no such column{hint} found {_names(found)}"
            )
    named = {**found, **{role: cell(found, path) for role, path in mapped}}
    there = lambda path: _has(named, path)  # noqa: E731
    for schema in SCHEMAS:
        if (schema.plain and not plain) or (schema.rated and not rated):
            continue
        prompt = next((name for name in schema.prompt if there(name)), None)
        group = (schema.group,) if schema.group else ()
        if prompt is None or not all(map(there, (*schema.files.columns, *schema.needs, *group))):
            continue
        labels = {name: one for name, one in schema.labels.items() if all(map(there, one.columns))}
        if not labels:
            continue
        chosen = _label(schema, labels, label, place)
        if isinstance(chosen, Choice):  # its cells may name the columns, as the table has them
            chosen = replace(
                chosen, rivals=tuple(dict(mapped).get(name, name) for name in schema.files.columns)
            )
        layout = Layout(schema, prompt, chosen, tuple(mapped), found)
        source = source_column(layout, named, place)
        if source and group:
            raise UserError(
                f"{place}: {source!r} is a source image, and rows of {schema.name} are one image each; "
                "allowed with a source: rows that hold all rivals"
            )
        return replace(layout, source=source)
    raise UserError(_none_fits(found, place, plain))


def _label(schema: Schema, labels: Mapping[str, Label], wanted: str, place: str) -> Label:
    """Return the label that ``data.label`` names, or the only or overall one."""
    first, every = next(iter(labels)), next(iter(schema.labels))
    if not wanted and (len(labels) == 1 or first == every):
        return labels[first]
    if not wanted:
        raise UserError(f"{place}: several labels; set data.label to one of {', '.join(labels)}")
    if every == "":
        raise UserError(f"{place}: data.label is {wanted!r}, but the schema {schema.name} has one label only")
    if wanted not in labels:
        raise unknown("label (data.label)", wanted, labels)
    return labels[wanted]


def _has(found: Any, path: str) -> bool:
    """Return whether a dotted path exists; where prototypes do not show nested fields, its first part
    decides."""
    if isinstance(found, Mapping) and path in found:
        return True
    head, dot, _ = path.partition(".")
    if not dot or not isinstance(found, Mapping) or head not in found:
        return False
    return found[head] is None or cell(found, path) is not None


def _none_fits(found: Mapping[str, Any], place: str, plain: bool) -> str:
    names = sorted({schema.name for schema in SCHEMAS if not schema.plain and not schema.rated})
    return (
        f"{place}: no preference columns; found {_names(found)}; "
        f"needed caption (or prompt) with jpg_0, jpg_1, label_0, label_1 (or best_image_uid, image_0_uid, "
        f"image_1_uid), or with chosen, rejected, or with path1 (preferred), path2, or with images, scores, "
        f"or with image, liked, or with image, altered{', or with image' if plain else ''}; "
        f"of videos video_0, video_1, label_0, label_1, or videos with scores or segments, or video, liked; "
        f"or the columns of {', '.join(names)}; or name yours: data.columns {_roles_for(found)}"
    )


RIVALS = (
    ("chosen", "rejected"), ("winner", "loser"), ("winning", "losing"), ("win", "lose"), ("win", "loss"),
    ("won", "lost"), ("w", "l"), ("preferred", "dispreferred"), ("preferred", "rejected"),
    ("accepted", "rejected"), ("better", "worse"), ("best", "worst"), ("good", "bad"),
    ("positive", "negative"), ("pos", "neg"),
)  # fmt: skip
"""Words in the names of two columns that differ in nothing else: of the better image and of the worse one."""


def _roles_for(found: Collection[str]) -> str:
    """Return a value of ``data.columns`` for these columns, as far as their names say what they hold."""
    prompt = next((name for name in PROMPTS if name in found), "X")
    better, worse = next(_named_rivals(found), ("Y", "Z"))
    return f"prompt={prompt},chosen={better},rejected={worse}"


def _named_rivals(found: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (better, worse) columns that differ in one word of ``RIVALS`` alone."""
    for better, worse in RIVALS:
        word = re.compile(rf"(?<![a-z]){better}(?![a-z])", re.IGNORECASE)
        others = {name.casefold(): name for name in found}
        for name in map(str, found):
            twin = others.get(word.sub(worse, name).casefold())
            if twin is not None and word.search(name):
                yield name, twin


def _names(found: Collection[str]) -> str:
    return ", ".join(sorted(map(str, found))) or "none"


def read_row(
    row: Mapping[str, Any], layout: Layout, where: str, image: Opener, rated: bool = False
) -> Example | Skipped:
    """Return the example of a row, or the reason why there is none.

    A row of a schema that groups rows gives an example of one image with its rating (``rivals`` joins them).
    ``rated`` keeps a row without a label, since rewards will score it.

    Raises:
        UserError: a label, reward or weight that is none, or several inputs beside the prompt.
    """
    schema, row = layout.schema, layout.named(row)
    source = source_image(layout, row, where, image) if layout.source or schema.inputs else None
    if isinstance(source, Skipped):
        return source
    if truth(row.get("are_different"), "are_different", where) is False:
        return Skipped("are_different is false", where, "identical")
    if read_weight(row.get("weight"), where) == 0:
        return Skipped("its weight is 0", where, "undecided")
    verdict = _verdict(layout, row, where)
    if verdict is None and not rated and row.get("segments") is None:
        return Skipped("no label", where, "unlabelled")
    prompt = _prompt(layout, row)
    if prompt is None:
        return Skipped(f"no text in column {layout.prompt!r}", where)
    values = schema.files(row, where)
    if values is None:
        return Skipped(f"no image in column {schema.files.columns[0]!r}", where)
    if verdict is not None and len(verdict.scores) != len(values) and not schema.altered:
        raise UserError(
            f"{where}: {len(verdict.scores)} scores for {len(values)} {schema.files.columns[0]}; allowed: "
            "one score an image or video"
        )
    images = []
    for name, value in values:
        reference = image(value, f"{where}, column {name!r}")
        if reference is None:
            return Skipped(f"no image in column {name!r}", where)
        images.append(reference)
    prompts: tuple[str, ...] = ()
    if schema.altered:
        if not isinstance(row["altered"], str):
            return Skipped("no text in column 'altered'", where)
        images, prompts = images * 2, (prompt, row["altered"])
    example = _example(row, prompt, prompts, images, verdict=verdict, where=where, image=image, rated=rated)
    return example if isinstance(example, Skipped) else replace(example, source=source)


def _example(
    row: Mapping[str, Any],
    prompt: str,
    prompts: tuple[str, ...],
    images: list[ImageRef],
    *,
    verdict: Verdict | None,
    where: str,
    image: Opener,
    rated: bool,
) -> Example | Skipped:
    segments = read_segments(row.get("segments"), where, len(images))
    scores = verdict.scores if verdict else (overall(segments) if segments else None)
    if scores is None and not rated:
        return Skipped("no label", where, "unlabelled")
    return Example(
        prompt,
        tuple(images),
        scores or (),
        where,
        prompts,
        read_rewards(row.get("rewards"), where, len(images)),
        read_maps(row.get("patches"), row.get("mask"), where, len(images), image),
        read_weight(row.get("weight"), where),
        segments=segments,
        segment_seconds=read_seconds(row.get("segment_seconds"), where),
        votes=verdict.votes if verdict else (),
        time_labels=read_time_labels(row.get("time_labels"), where),
    )


def _verdict(layout: Layout, row: Mapping[str, Any], where: str) -> Verdict | None:
    return Verdict((1.0, 0.0)) if layout.schema.altered else layout.label(row, where)


def _prompt(layout: Layout, row: Mapping[str, Any]) -> str | None:
    text = cell(row, layout.prompt)
    if isinstance(text, list | tuple) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        return None
    if not layout.schema.within:
        return text
    found = re.search(layout.schema.within, text, re.IGNORECASE)
    return found.group(1).strip() if found else None


def rivals(
    rows: Iterable[tuple[str, Example | Skipped]], layout: Layout, everywhere: bool
) -> Iterator[Example | Skipped]:
    """Join examples of one image each whose keys are equal into groups.

    Args:
        rows: (key, example).
        layout: of the rows; its label is a Rating or a Checklist.
        everywhere: rows of a group may be anywhere; else they are consecutive, and none are held in memory.
    """
    rating = layout.label
    assert isinstance(rating, Rating | Checklist)
    if everywhere:
        held: dict[str, list[Example | Skipped]] = {}
        for key, example in rows:
            held.setdefault(key, []).append(example)
        groups: Iterable[list[Example | Skipped]] = held.values()
    else:
        groups = ([example for _, example in some] for _, some in groupby(rows, key=lambda pair: pair[0]))
    for members in groups:
        yield from (one for one in members if isinstance(one, Skipped))
        if images := [one for one in members if isinstance(one, Example)]:
            yield _joined(images, rating)


def _joined(members: list[Example], rating: Rating | Checklist) -> Example | Skipped:
    first = members[0]
    if len(members) > 1:
        return Example(
            first.prompt,
            tuple(member.images[0] for member in members),
            tuple(member.scores[0] for member in members),
            first.where,
        )
    if rating.rank:
        return Skipped(
            "the only image of its prompt, and a rank says nothing alone", first.where, "unlabelled"
        )
    middle = (rating.low + rating.high) / 2
    if first.scores[0] == middle:
        return Skipped("the only image of its prompt, rated in the middle", first.where, "unlabelled")
    return Example(first.prompt, first.images, (float(first.scores[0] > middle),), first.where)
