"""Prompts with their categories: files, built-in lists, and the sets that papers evaluate on.

Four published sets are known by name: ``parti`` (PartiPrompts; Yu et al. 2022, arXiv 2206.10789),
``drawbench`` (Saharia et al. 2022, arXiv 2205.11487), ``geneval`` (Ghosh et al. 2023, arXiv 2310.11513) and
``hpdv2`` (the HPSv2 benchmark; Wu et al. 2023, arXiv 2306.09341). They are fetched on first use and cached by
the hub's client; this package contains nothing of them. ``parti:FILE`` and so on reads a copy in the
published layout instead.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from diffalign.data.prompts.prompt_files import (
    CATEGORIES,
    FORMATS,
    Row,
    category_of,
    file_rows,
    prompt_of,
    sourced,
)
from diffalign.data.prompts.prompt_lists import LISTS
from diffalign.data.prompts.published_prompts import PUBLISHED, Published
from diffalign.errors import UserError, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their order, with categories.

    Attributes:
        prompts: (N,) none of them empty; one may occur twice. Those about a source image are
            ``SourcedPrompt``s.
        categories: by axis (PartiPrompts: ``category`` and ``challenge``; DrawBench: ``category``; GenEval:
            ``tag``; GenEval 2: ``atoms`` and ``skills``; HPDv2: ``style``; a file with such a column:
            ``category``), (N,) each; "" for a prompt that has none. Empty where the set has no categories.
    """

    prompts: tuple[str, ...]
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_prompt_set(path: str, limit: int | None = None) -> PromptSet:
    """Return the prompts of ``path`` with categories, without empty ones, at most the first ``limit``.

    ``path`` is a file, a published set or a built-in list:

    - ``.txt`` has a prompt a line; ``.jsonl`` and ``.json`` objects with a field ``prompt``, ``caption`` or
      ``text``; ``.tsv``, ``.csv`` and ``.parquet`` a column of such a name. A field or column ``category`` or
      ``categories`` is the axis ``category``; ``source``, ``path_src`` and so on hold a source image.
    - ``parti``, ``drawbench``, ``geneval``, ``hpdv2``: fetched and cached; ``parti:FILE`` (and so on): a
      copy.
    - ``tiny:train``, ``tiny:validation`` and ``tiny:test`` are the drawn scenes', ``tiny:patterns/train`` and
      so on the patterned scenes', ``tiny:motions/train`` and so on the moving shapes'; ``animals`` and
      ``activities`` are lists of our own (`prompt_lists`).

    Raises:
        UserError: the file is missing, unreadable or empty, naming what was found and what is needed; the hub
            cannot be reached.
    """
    name, colon, place = path.partition(":")
    if path.startswith("tiny:"):
        return PromptSet(_tiny(place, limit))
    if path in LISTS:
        return PromptSet(tuple(LISTS[path]()[:limit]))
    if name in PUBLISHED and (not colon or place):
        published = PUBLISHED[name]
        return _published(published, published.copy(place) if colon else published.fetched(), limit)
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"prompt file {path!r}: no such file; allowed: {FORMATS}, or {', '.join(PUBLISHED)}, "
            f"or {next(iter(PUBLISHED))}:FILE (and so on), "
            "or tiny:train, tiny:validation, tiny:test, tiny:motions/train, tiny:patterns/train (and so on), "
            f"{', '.join(LISTS)}"
        )
    axes = {"category": lambda row: category_of(row, CATEGORIES)}
    return _gathered(file_rows(file), axes, path, limit, file.parent)


def _published(published: Published, rows: Iterable[Row], limit: int | None) -> PromptSet:
    axes = {axis: _axis(columns) for axis, columns in published.axes.items()}
    return _gathered(rows, axes, published.name, limit)


def _axis(columns: tuple[str, ...]) -> Callable[[Row], str]:
    return lambda row: category_of(row, columns)


def _gathered(
    rows: Iterable[Row],
    axes: Mapping[str, Callable[[Row], str]],
    place: str,
    limit: int | None,
    folder: Path = Path(),
) -> PromptSet:
    kept = list(islice((row for row in rows if prompt_of(row)), limit))
    if not kept:
        raise UserError(f"{place}: no prompts in it")
    values_of = {axis: tuple(map(of, kept)) for axis, of in axes.items()}
    return PromptSet(
        tuple(sourced(row, folder) for row in kept),
        {axis: values for axis, values in values_of.items() if any(values)},
    )


def _tiny(name: str, limit: int | None) -> tuple[str, ...]:
    from diffalign import tiny

    of = {f"{world}{split}": (world, split) for world in tiny.CAPTIONS for split in SPLITS}
    if name not in of:
        raise unknown("embedded prompts", f"tiny:{name}", [f"tiny:{known}" for known in of])
    world, split = of[name]
    return tuple(tiny.CAPTIONS[world](split, None)[:limit])


def read_prompts(path: str, limit: int | None = None) -> list[str]:
    """Return the prompts of a file, a published set or a built-in list, without empty ones.

    At most the first ``limit``. What ``path`` may be, and the errors, are `prompt_sets.read_prompt_set`'s.
    """
    return list(read_prompt_set(path, limit).prompts)
