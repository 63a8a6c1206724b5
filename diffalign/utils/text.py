"""Read text, JSON and JSON lines from user files, with bounds on size and nesting.

Every reader raises a UserError that names the file and the line for: an encoding other than UTF-8 (UTF-16 and
UTF-32 are read if the file has a byte-order mark), null bytes, unpaired surrogates, integers of more than
``DIGITS`` digits, and nesting deeper than ``DEPTH``. Byte-order marks are removed. ``utils.yaml_reader``
reads YAML. Importing this module does not import torch.
"""

import codecs
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffalign.errors import UserError

TEXT_BYTES = 2**30
"""Largest size in bytes of a text file, a JSON file, or one line of a JSON-lines file."""
DEPTH = 100
"""Largest number of levels of nesting."""
DIGITS = 300
"""Largest number of digits of an integer; a float's range ends at 309."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: it begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def user_path(path: str | os.PathLike[str], what: str = "path") -> Path:
    """Return a path with ``~`` and ``~name`` expanded; ``what`` names the path in messages.

    Raises:
        UserError: it holds a null byte, a part is longer than file systems allow, or the user is unknown.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise UserError(f"{what} {text!r} holds a null byte; allowed: the name of a file or folder")
    if any(len(os.fsencode(part)) > 255 for part in re.split(r"[/\\]", text)) or len(text) > 4000:
        raise UserError(f"{what} {text[:60]!r}... is too long for a file name; allowed: 255 bytes a part")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{what} {text!r}: no home folder of {text.split('/')[0]!r} is known") from error


def read_text(path: str | os.PathLike[str], limit: int = TEXT_BYTES) -> str:
    r"""Return the text of a file without its byte-order mark; line ends become ``\n``.

    Args:
        path: the file.
        limit: largest size in bytes.

    Raises:
        UserError: the file cannot be read, is larger, or is not UTF-8 text; it names the line.
    """
    file = user_path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise _unreadable(file, error) from error
    if len(content) > limit:
        raise UserError(f"{file}: larger than {limit:,} bytes; needed: a text file of at most that")
    text = decode(content, str(file))
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def decode(content: bytes, where: str) -> str:
    """Decode bytes as text without a byte-order mark; ``where`` is their location, for messages.

    Raises:
        UserError: they are not UTF-8 (or the encoding of their byte-order mark), or hold null bytes.
    """
    mark, encoding = next((m for m in _MARKS if content.startswith(m[0])), (b"", "utf-8"))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, len(mark) + error.start) + 1
        byte = content[len(mark) + error.start]
        raise UserError(
            f"{where} line {line}: not UTF-8 text ({error.reason}, byte 0x{byte:02x}); save it as UTF-8, for "
            "example with: iconv -f windows-1252 -t utf-8 FILE"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{where} line {line}: holds a null byte; needed: a text file in UTF-8")
    return text


def text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """Yield ("FILE line N", line without its end) for every line of a text file, empty lines included.

    Raises:
        UserError: as ``read_text``.
    """
    file = Path(path)
    lines = read_text(file).split("\n")  # not splitlines: a prompt may hold other line separators
    if lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield f"{file} line {number}", line


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text; ``where`` is its location, for messages.

    Raises:
        UserError: it is not JSON, or exceeds a bound of this module.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
        if "\\u0000" in text and "\0" in "".join(_texts(value)):
            raise ValueError("a text holds a null byte")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, character {error.colno}" if "\n" in text else f"character {error.pos}"
        raise UserError(f"{where}: not JSON: {error.msg} at {place}") from error
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair, {error.object[error.start]!a}, which is no character"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; allowed: {DEPTH} levels") from error
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if text.count("[") + text.count("{") > DEPTH and _deeper(value, DEPTH):
        raise UserError(f"{where}: nested too deeply; allowed: {DEPTH} levels")
    return value


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: as ``read_text`` and ``parse_json``.
    """
    return parse_json(read_text(path), str(path))


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: as ``read_json``, or the value is no object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {_short(value)}; needed: a JSON object")
    return value


def json_lines(
    path: str | os.PathLike[str], example: str = "", cut: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE line N", object) for every non-empty line of a JSON-lines file.

    Args:
        path: the file.
        example: an example of an object, for the message about a line with another kind of value.
        cut: whether to skip a last line that is not JSON, as a killed process leaves it.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8, not JSON, or no object; it names the line.
    """
    file, pending = user_path(path), None
    for number, content in _byte_lines(file):
        if pending is not None:
            raise pending
        where = f"{file} line {number}"
        try:
            line = decode(content, where).strip()
            row = parse_json(line, where) if line else None
        except UserError as error:
            error = UserError(str(error).replace(f"{where} line 1:", f"{where}:"))
            if not cut:
                raise error from None
            pending = error  # raised only if another line follows
            continue
        if not line:
            continue
        if not isinstance(row, dict):
            raise UserError(f"{where}: {_short(row)}; needed: an object{example and ' such as '}{example}")
        yield where, row


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSON-lines log in order, without a last line cut off by a crash.

    A missing file gives [].

    Raises:
        UserError: another line is not a JSON object; it names the line.
    """
    return [row for _, row in json_lines(path, cut=True)] if path.exists() else []


def _byte_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number, bytes) of each line; a UTF-16 or UTF-32 file is read at once."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            if any(start.startswith(mark) for mark, _ in _MARKS[1:]):
                yield from enumerate(read_text(file).encode().split(b"\n"), 1)
                return
            number = 0
            while line := stream.readline(TEXT_BYTES + 1):
                number += 1
                if len(line) > TEXT_BYTES:
                    raise UserError(f"{file} line {number}: longer than {TEXT_BYTES:,} bytes")
                yield number, line
    except OSError as error:
        raise _unreadable(file, error) from error


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits; allowed: {DIGITS}")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these fields; ValueError for a duplicate name, since a value would be lost."""
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is given twice in one object")
    return value


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value:
            yield from _texts(item)
        if isinstance(value, dict):
            yield from _texts(list(value.values()))


def _deeper(value: Any, levels: int) -> bool:
    """Return whether a value is nested deeper than ``levels``."""
    for _ in range(levels):
        if isinstance(value, dict):
            value = list(value.values())
        if not isinstance(value, list):
            return False
        value = [
            inner
            for item in value
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not value:
            return False
    return True


def _unreadable(file: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"no such file: {str(file)!r}, looked for as {str(file.absolute())!r}")
    if isinstance(error, IsADirectoryError) or (error.errno == errno.EACCES and file.is_dir()):
        return UserError(f"{str(file)!r} is a folder; needed: a file")
    return UserError(f"{str(file)!r} cannot be read: {error.strerror}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
