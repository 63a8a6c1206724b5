"""Read and write the ``Run`` tree: values from YAML, overrides from dotted flags. Imports no torch.

Beside the fields of ``Run`` a file may have ``base: other.yaml`` (relative to the file), whose values it
overrides. The ``method`` section is checked against the method's dataclass when training starts
(``diffalign.methods.build``), since that needs torch.
"""

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from diffalign.config.build import build
from diffalign.config.fields import options
from diffalign.config.files import find_config, shipped_configs
from diffalign.config.schema import Run
from diffalign.errors import UserError
from diffalign.utils.yaml_reader import parse_yaml

__all__ = [
    "apply_overrides",
    "find_config",
    "from_dict",
    "shipped_configs",
    "to_dict",
    "to_yaml",
    "tree_from",
]

Tree = TypeVar("Tree")

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
"""Numbers that YAML 1.1 reads as strings because they lack the dot or the sign: 1e-5."""


def from_dict(data: Mapping[str, Any], where: str = "the configuration") -> Run:
    """Build a run from a nested mapping, without checking ranges (see ``ranges.check_ranges``).

    Raises:
        UserError: an unknown key (it names similar ones), or a value of the wrong type.
    """
    return tree_from(Run, data, where)


def tree_from(cls: type[Tree], data: Mapping[str, Any], where: str) -> Tree:
    """Build a tree of frozen dataclasses, as ``from_dict`` does; ``where`` names the mapping in messages."""
    _check_keys(data, cls, "", where, cls)
    try:
        return build(cls, _repaired(data), "")
    except UserError as error:
        raise UserError(f"{error} (in {where})") from error


def typed(run: Tree) -> Tree:
    """Return a tree of dataclasses that was built in Python as the same values in YAML give it.

    Sections that are mappings become dataclasses, lists tuples, paths texts, and whole numbers floats where
    floats are.

    Raises:
        UserError: an unknown key, or a value of the wrong type.
    """
    return tree_from(type(run), to_dict(run), f"the {type(run).__name__}")


def apply_overrides(run: Tree, args: Sequence[str]) -> Tree:
    """Apply dotted flags to a run: ``["--model.lora.rank", "32", "--training.steps=10"]``; the last one wins.

    ``--method NAME`` selects another method with its own defaults; ``--method.beta 5`` sets a field of it.

    Raises:
        UserError: an unknown field, a flag without a value, or a value of the wrong type.
    """
    allowed = 'allowed: a list of texts, such as ["--training.steps", "100"]'
    if isinstance(args, str):
        raise UserError(f"the overrides are the text {args!r}; {allowed}")
    if wrong := [one for one in args if not isinstance(one, str)]:
        raise UserError(f"override {wrong[0]!r} is a {type(wrong[0]).__name__}; {allowed}")
    names, data = list(args), to_dict(run)
    while names:
        flag = names.pop(0)
        if not flag.startswith("--"):
            raise UserError(f"unexpected {flag!r}; overrides look like --training.steps 100")
        name, equals, text = flag[2:].partition("=")
        kind = field_kind(name, type(run))
        if not equals:
            bare = not names or names[0].startswith("--")
            if bare and not is_switch(kind):
                raise UserError(f"--{name} needs a value")
            text = "true" if bare else names.pop(0)
        set_value(data, name, parse_text(text, kind, name in _with_commas(type(run))))
        run = tree_from(type(run), data, f"flag --{name}")
        data = to_dict(run)
    return run


def to_dict(run: Any) -> dict[str, Any]:
    """Return all fields of the run as nested dicts and lists."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(run))
    return plain


def to_yaml(run: Any) -> str:
    """Return the run as YAML, from which an equal tree is built."""
    return yaml.safe_dump(to_dict(run), sort_keys=False, allow_unicode=True, width=110)


def field_kind(dotted: str, tree: Any = Run) -> Any:
    """Return the type of a field of the tree, by its dotted name; ``Any`` below ``method``.

    Raises:
        UserError: no such field.
    """
    if dotted.startswith("method."):
        return Any
    cls: Any = tree
    for i, part in enumerate(dotted.split(".")):
        kinds = get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in kinds:
            raise _unknown_key(dotted, ".".join(dotted.split(".")[:i]), kinds, f"flag --{dotted}", tree)
        cls = kinds[part]
    if dataclasses.is_dataclass(cls):
        inside = ", ".join(f"--{dotted}.{f.name}" for f in dataclasses.fields(cls))
        raise UserError(f"--{dotted} is a section; its fields are {inside}")
    return cls


def is_switch(kind: Any) -> bool:
    """Return whether a field of type ``kind`` may be set to true by its flag alone: a bool, or a bool or a
    number."""
    return kind is bool or {bool, int} <= {*get_args(kind)}


def parse_text(text: str, kind: Any, with_commas: bool = False) -> Any:
    """Parse a flag's text for a field of type ``kind``.

    ``with_commas``: for a list of strings, a text that is no YAML list is one entry, commas included.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() in ("none", "null"):
            return None
        return parse_text(text, next(a for a in arguments if a is not type(None)))
    if kind is str or origin is Literal:
        return text
    if origin is not None and issubclass(origin, Mapping) and not text.lstrip().startswith("{"):
        return {"type": text}
    if origin is tuple and with_commas and not _is_yaml_list(text):
        return [text] if text else []
    if origin is tuple and not text.lstrip().startswith("["):
        return [
            part.strip() if _is_text(arguments[0]) else _read(part.strip())
            for part in text.split(",")
            if part
        ]
    return _read(text)


def _with_commas(tree: Any) -> frozenset[str]:
    """Return the dotted names of the lists whose entries may hold commas."""
    return frozenset(name for name, field, _ in options(tree) if field.metadata.get("with_commas"))


def _is_yaml_list(text: str) -> bool:
    """Return whether a text is a list in YAML: "[a, b]", but not the prompt "[a] beside (b)"."""
    return text.lstrip().startswith("[") and isinstance(_read(text), list)


def _is_text(kind: Any) -> bool:
    """Return whether entries of this type are written as names: strings, or mappings with a ``type``."""
    return kind is str or (get_origin(kind) is not None and issubclass(get_origin(kind), Mapping))


def set_value(data: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``value`` at a dotted name of a nested dict; a string in a mapping's place becomes its ``type``."""
    *parents, last = dotted.split(".")
    for part in parents:
        inner = data.get(part, {})
        data[part] = dict(inner) if isinstance(inner, Mapping) else {"type": inner}
        data = data[part]
    if last == "type" and dotted.startswith("method.") and data.get("type", value) != value:
        data.clear()  # another method or loss starts from its own defaults
    data[last] = value


def dotted_names(cls: Any = Run, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every leaf of the tree: ``output``, ``model.lora.rank``, ..."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from dotted_names(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _check_keys(data: Mapping[str, Any], cls: Any, prefix: str, where: str, tree: Any) -> None:
    kinds = get_type_hints(cls)
    for key, value in data.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if key not in kinds:
            raise _unknown_key(dotted, prefix, kinds, where, tree)
        if dataclasses.is_dataclass(kinds[key]) and isinstance(value, Mapping):
            _check_keys(value, kinds[key], dotted, where, tree)


def _unknown_key(dotted: str, prefix: str, siblings: Mapping[str, Any], where: str, tree: Any) -> UserError:
    """Return the error for an unknown key, with similar siblings and equal names in other sections."""
    leaf = dotted.rpartition(".")[2]
    if not prefix and dotted in dotted_names(tree) and dotted not in siblings:
        section, _, rest = dotted.partition(".")
        return UserError(
            f"key {dotted!r} in {where} has a dot, as flags have; allowed in YAML: nested keys, "
            f"{section}: {{{rest}: ...}}"
        )
    near = [f"{prefix}.{n}".lstrip(".") for n in get_close_matches(leaf, siblings, n=2, cutoff=0.6)]
    elsewhere = [name for name in dotted_names(tree) if name.rpartition(".")[2] == leaf]
    alike = get_close_matches(dotted, list(dotted_names(tree)), n=2, cutoff=0.7)
    guesses = list(dict.fromkeys([*elsewhere, *near, *alike]))[:3]
    hint = f"did you mean {' or '.join(guesses)}? " if guesses else ""
    place = f"allowed in {prefix}: " if prefix else "allowed: "
    return UserError(f"unknown key {dotted!r} in {where}; {hint}{place}{', '.join(siblings) or 'nothing'}")


def _repaired(data: Mapping[str, Any]) -> dict[str, Any]:
    """Correct values that YAML 1.1 misreads: the precision ``no``, and ``1e-5`` in a method."""
    repaired = {k: dict(v) if isinstance(v, Mapping) else v for k, v in data.items()}
    training = repaired.get("training")
    if isinstance(training, dict) and training.get("mixed_precision") is False:
        training["mixed_precision"] = "no"
    if "method" in repaired:
        repaired["method"] = _numbers(_named(repaired["method"]))
    if isinstance(repaired.get("strategies"), list | tuple):
        repaired["strategies"] = [_numbers(_named(entry)) for entry in repaired["strategies"]]
    return repaired


def _named(value: Any) -> Any:
    """Return the mapping ``{"type": name}`` for a bare name."""
    return {"type": value} if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _read(text: str) -> Any:
    """Parse a flag's text as YAML; return the text itself if it is no YAML."""
    try:
        return parse_yaml(text, text[:60])
    except UserError as error:
        if isinstance(error.__cause__, yaml.YAMLError):
            return text
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
