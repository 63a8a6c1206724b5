"""Layouts of published prompt sets that are not plain lists: a row of (place, fields) for each prompt."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from diffalign.data.prompts.prompt_files import COLUMNS, Row, column, file_rows
from diffalign.errors import UserError
from diffalign.utils.text import parse_json

_FIELDS = ("prompt", "prompt_en", *COLUMNS)


def any_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a table or of json: lists of texts or objects, objects by id, json lines.

    The field ``prompt_en`` (OneIG, UniGenBench, VBench) is read as ``prompt``.

    Raises:
        UserError: another layout.
    """
    rows = _json_rows(file) if file.suffix.lower() == ".json" else file_rows(file)
    for where, fields in rows:
        name = column(fields, _FIELDS)
        yield where, fields if name is None else {**fields, "prompt": fields[name]}


def unique_rows(file: Path) -> Iterator[Row]:
    """Yield the first row of each prompt of ``any_rows``, for sets with several rows a prompt."""
    seen: set[Any] = set()
    for where, fields in any_rows(file):
        prompt = fields.get("prompt")
        if prompt not in seen:
            seen.add(prompt)
            yield where, fields


def geneval2_rows(file: Path) -> Iterator[Row]:
    """Yield GenEval 2's prompts; ``skill_set`` are the distinct ones of ``skills``, which has one a question.

    Raises:
        UserError: another layout.
    """
    for where, fields in any_rows(file):
        skills = fields.get("skills")
        yield where, {**fields, "skill_set": sorted(set(skills))} if _are_texts(skills) else fields


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def dpg_rows(place: Path) -> Iterator[Row]:
    """Yield DPG-Bench's prompts: of its csv, a row a proposition of an item, or of its folder of texts."""
    if place.is_dir():
        yield from _texts(place, "*.txt", whole=True)
    else:
        yield from unique_rows(place)


def compbench_rows(place: Path) -> Iterator[Row]:
    """Yield T2I-CompBench's prompts, a line each; a file's name says their category: ``color_val.txt``."""
    if place.is_dir():
        yield from _texts(place, "*_val.txt", whole=False)
    else:
        yield from _lines(place)


def gedit_rows(language: str, place: Path) -> Iterator[Row]:
    """Yield GEdit-Bench's instructions in a language ("en", "cn"), of a parquet file or a folder of them."""
    files = sorted(place.rglob("*.parquet")) if place.is_dir() else [place]
    if not files:
        raise UserError(f"{place}: no *.parquet in it; needed: the files of GEdit-Bench")
    for file in files:
        for where, fields in any_rows(file):
            if fields.get("instruction_language", language) == language:
                yield where, fields


def imgedit_rows(place: Path) -> Iterator[Row]:
    """Yield ImgEdit-Bench's instructions, objects by number whose ``id`` is the path of the source.

    Sources are looked for beside the file, in ``singleturn`` and in ``Benchmark/singleturn``.
    """
    folders = [place.parent / name for name in ("singleturn", "Benchmark/singleturn", "")]
    for where, fields in any_rows(place):
        name = fields.get("id")
        if not isinstance(name, str):
            raise UserError(f"{where}: id is {name!r}; allowed: the path of the source image")
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            looked = " or ".join(str(folder / name) for folder in folders)
            raise UserError(f"{where}: no source image; looked for {looked}")
        yield where, {**fields, "source_image": str(found.resolve())}


def _texts(folder: Path, pattern: str, whole: bool) -> Iterator[Row]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: no {pattern} in it; needed: the prompts' texts")
    for file in files:
        if whole:
            yield file.name, {"prompt": " ".join(_read(file).split())}
        else:
            yield from _lines(file)


def _lines(file: Path) -> Iterator[Row]:
    category = file.stem.removesuffix("_val").removesuffix("_train")
    for number, line in enumerate(_read(file).split("\n"), 1):
        yield f"{file.name} line {number}", {"prompt": line.strip(), "category": category}


def _json_rows(file: Path) -> Iterator[Row]:
    data = parse_json(_read(file), str(file))
    if isinstance(data, Mapping):
        entries = [(f"{file.name} entry {name!r}", entry) for name, entry in data.items()]
    elif isinstance(data, list):
        entries = [(f"{file.name} entry {number}", entry) for number, entry in enumerate(data)]
    else:
        raise UserError(f"{file}: {str(data)[:60]!r}; allowed: a list of texts or objects, or objects by id")
    for where, entry in entries:
        if isinstance(entry, str):
            yield where, {"prompt": entry}
        elif isinstance(entry, Mapping):
            yield where, entry
        else:
            raise UserError(f"{where}: {str(entry)[:60]!r}; allowed: a text, or an object with a prompt")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
