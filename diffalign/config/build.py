"""Build frozen dataclasses from mappings (YAML, flags), with strict keys and types. Pure Python.

A field that holds one of several dataclasses has a table of them in its metadata (``choice``); the mapping's
``type`` selects one.
"""

import dataclasses
import os
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffalign.errors import UserError, unknown

T = TypeVar("T")


def choice(table: Mapping[str, type], default: Any) -> Any:
    """Return a dataclass field that holds an instance of one of the classes in ``table``."""
    return dataclasses.field(default=default, metadata={"choices": table})


def build(cls: type[T], values: Mapping[str, Any], where: str, start: T | None = None) -> T:
    """Build an instance of the dataclass ``cls`` from a mapping.

    Args:
        cls: the dataclass.
        values: field values; nested mappings become nested dataclasses.
        where: dotted name of the mapping, for messages ("method.loss"); "" at the top.
        start: instance whose values are used for missing keys; None: the class's defaults.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a value that the class refuses.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {} if start is None else {name: getattr(start, name) for name in fields}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"key in {where or 'the configuration'} ({cls.__name__})", key, fields)
        place = f"{where}.{key}" if where else key
        table = fields[key].metadata.get("choices")
        arguments[key] = (
            pick(table, value, place, arguments.get(key, fields[key].default))
            if table
            else convert(value, hints[key], place)
        )
    try:
        return cls(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError) as error:  # classes of methods and losses raise ValueError
        raise UserError(f"{where}: {error}" if where else str(error)) from error


def describe(value: Any) -> dict[str, Any]:
    """Return the mapping from which ``build`` makes an equal instance: all fields by name.

    Fields that a mapping cannot set are left out: state (``compare=False``), and dataclasses in a field that
    is not annotated as a dataclass and has no ``choice``.
    """
    hints = get_type_hints(type(value))
    plain = {}
    for f in dataclasses.fields(value):
        inner, table = getattr(value, f.name), f.metadata.get("choices", {})
        if not f.init or not f.compare:
            continue
        if not dataclasses.is_dataclass(inner):
            plain[f.name] = list(inner) if isinstance(inner, tuple) else inner
        elif table:
            names = [name for name, cls in table.items() if cls is type(inner)]
            plain[f.name] = {"type": names[0], **describe(inner)}
        elif dataclasses.is_dataclass(hints[f.name]):
            plain[f.name] = describe(inner)
    return plain


def pick(table: Mapping[str, type[T]], value: Any, where: str, default: Any = None) -> T:
    """Build an instance of the class that ``value`` names: ``"ipo"`` or ``{"type": "ipo", "tau": 1}``.

    A mapping without ``type`` overrides fields of ``default``, if there is one.

    Raises:
        UserError: the name is not in ``table``, or the other keys do not match the class.
    """
    if isinstance(value, str):
        value = {"type": value}
    if isinstance(value, Mapping) and "type" not in value and type(default) in table.values():
        return build(type(default), value, where, default)
    if not isinstance(value, Mapping) or "type" not in value:
        raise UserError(f"{where}={value!r}; allowed: one of {', '.join(table)}, or a mapping with `type`")
    if not isinstance(value["type"], str) or value["type"] not in table:
        raise unknown(f"type of {where}", value["type"], table)
    return build(table[value["type"]], {k: v for k, v in value.items() if k != "type"}, where)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert ``value`` to the type ``kind`` without loss: 3 to 3.0, "1e-5" to 1e-5, a list to a tuple.

    Raises:
        UserError: the value has another type.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        if {bool, int} <= {*arguments}:
            return _convert_bool_or_int(value, where)
        *literals, last = (a for a in arguments if a is not type(None))  # Literal["auto"] | float
        words = [word for literal in literals for word in get_args(literal)]
        return value if isinstance(value, str) and value in words else convert(value, last, where)
    if origin is Literal:
        if value not in arguments:
            raise unknown(where, value, [str(a) for a in arguments])
        return value
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise UserError(
                f"{where}={value!r}; allowed: a mapping with keys of {getattr(kind, '__name__', kind)}"
            )
        return build(kind, value, where)  # type: ignore[arg-type]
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r}; allowed: a mapping")
        return dict(value)
    return _convert_scalar(value, kind, where)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise UserError(f"{where}={value!r}; allowed: a list")
    kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
    if len(kinds) != len(value):
        raise UserError(f"{where}={value!r}; allowed: a list of {len(kinds)}")
    return tuple(convert(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))


def _convert_bool_or_int(value: Any, where: str) -> bool | int:
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if not isinstance(whole, int):
        raise UserError(f"{where}={value!r} ({type(value).__name__}); allowed: true, false or a whole number")
    return whole


def _convert_scalar(value: Any, kind: Any, where: str) -> Any:
    refused = UserError(f"{where}={value!r} ({type(value).__name__}); allowed: {_NAMES.get(kind, kind)}")
    if kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
        raise refused
    if kind is float and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            raise refused from None
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is str and isinstance(value, os.PathLike):  # of a run that is built in Python
        return os.fspath(value)
    if isinstance(value, kind):
        return value
    raise refused


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
