"""Shared by the commands: parsers that name the nearest option, tables, the device. No torch on import."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, unknown
from diffalign.utils.devices import device_name as device_name
from diffalign.utils.devices import share as share
from diffalign.utils.places import file_to_write, folder_to_write, place_to_write


def make_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser with the examples below its options."""
    return argparse.ArgumentParser(
        prog=f"diffalign {name}",
        description=description,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments.

    Raises:
        UserError: an unknown option, with the nearest names, or an unexpected word.
    """
    args, extra = parser.parse_known_args(argv)
    if extra:
        name = extra[0].partition("=")[0]
        if name.startswith("-"):
            raise unknown(
                f"option of {parser.prog}", name, (o for a in parser._actions for o in a.option_strings)
            )
        raise UserError(f"{parser.prog}: unexpected {extra[0]!r}; see {parser.prog} --help")
    return args


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float from ``low`` to ``high``, ints below 2^63."""
    bound = min(high, 2**63 - 1) if kind is int else high

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= bound or not math.isfinite(value):
            word = "a whole number" if kind is int else "a number"
            upper = f" to {high}" if high != float("inf") else " or more"
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise argparse.ArgumentTypeError(f"{shown!r} is not {word} in range; allowed: {low}{upper}")
        return value

    return read


def side(text: str) -> int:
    """Return the side of an image in pixels, for argparse: a multiple of 8, which autoencoders need."""
    value: int = number(int, 8, 2**15)(text)
    if value % 8:
        near = round(value / 8) * 8
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 8; allowed: one, such as {near}")
    return value


def output_folder(text: str) -> str:
    """Return the path of a folder to write into, for argparse; it may be there already."""
    return _output(folder_to_write, text)


def output_file(text: str) -> str:
    """Return the path of a file to write, for argparse; it may be there already."""
    return _output(file_to_write, text)


def output_path(text: str) -> str:
    """Return the path of a file or a folder to write, for argparse; it may be there already."""
    return _output(place_to_write, text)


def _output(check: Callable[[str], Path], text: str) -> str:
    try:
        return str(check(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def names(text: str, what: str) -> list[str]:
    """Return the parts of ``a,b,c``.

    Raises:
        UserError: no name, or one given twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if parts.count(part) > 1:
            raise UserError(f"{what} {text!r} has {part!r} twice; allowed: each once")
    if not parts:
        raise UserError(f"{what} {text!r} names nothing; give one or more, separated by commas")
    return parts


def add_reading_options(parser: argparse._ActionsContainer) -> None:
    """Add the options on how a preference set is read; ``reading_of`` returns those that were given."""
    parser.add_argument("--split", help="of a hub dataset or a folder of tables; default train")
    parser.add_argument(
        "--columns", metavar="ROLE=COLUMN,...", help="names of your columns: prompt=caption,chosen=better"
    )
    parser.add_argument("--label", metavar="NAME", help="of a set with several labels, such as VQ")
    parser.add_argument("--root", metavar="FOLDER", help="folder that the paths in a table are relative to")
    parser.add_argument("--videos", action="store_true", help="the set holds videos")


def reading_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of ``DataConfig`` that ``add_reading_options`` were given for."""
    given = {name: value for name in ("split", "label", "root") if (value := getattr(args, name)) is not None}
    if args.columns:
        given["columns"] = tuple(names(args.columns, "--columns"))
    return given | ({"frames": 1} if args.videos else {})


def count(number: int, noun: str) -> str:
    """Return a number with its noun: "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Aligned columns."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def as_mapping(card: Any, fields: Sequence[str]) -> Mapping[str, Any]:
    """Return some attributes of a card, for JSON."""
    return {name: getattr(card, name) for name in fields}


def tell_of_prompts(prompts: Sequence[str]) -> None:
    """Print what the prompts of a list have that may not be meant, on the first process."""
    from diffalign.data.prompts.prompt_syntax import notes_on

    for note in notes_on(prompts) if share()[0] == 0 else ():
        print(f"note: {note}", file=sys.stderr)
