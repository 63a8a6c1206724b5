"""Read YAML with bounds on nesting, integers and anchors (recursive, or expanding to many values).

Importing this module does not import torch.
"""

import os
import re
from typing import Any

import yaml

from diffalign.errors import UserError
from diffalign.utils.text import DEPTH, DIGITS, read_text

YAML_BYTES = 2**20
"""Largest size of a YAML text, in bytes."""
NODES = 100_000
"""Largest number of values of a YAML text with its anchors expanded."""
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]*[1-9]|[0-9_]+:)(?![^:]*[.eE])")
"""Numbers of YAML 1.1 that are no decimal ones, though they look so."""


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text; ``where`` is its location, for messages.

    Raises:
        UserError: it is not YAML, a mapping has a key twice, or it exceeds a bound of this module.
    """
    if len(text) > YAML_BYTES:
        raise UserError(f"{where}: larger than {YAML_BYTES:,} bytes, which is no YAML file of settings")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _measure(node, where, (), {})
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{where}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not a YAML text: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; allowed: {DEPTH} levels") from error
    except UserError:
        raise
    except (ValueError, OverflowError, TypeError) as error:  # invalid dates and numbers
        raise UserError(f"{where}: not valid YAML: {error}") from error


def read_yaml_file(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file.

    Raises:
        UserError: as ``read_text`` and ``parse_yaml``.
    """
    return parse_yaml(read_text(path, YAML_BYTES), str(path))


def _measure(node: yaml.Node, where: str, above: tuple[yaml.Node, ...], sizes: dict[int, int]) -> int:
    """Return the number of values of a YAML node; an anchor counts at each reference to it."""
    if id(node) in sizes:
        return sizes[id(node)]
    place = f"{where} line {node.start_mark.line + 1}"
    if any(node is ancestor for ancestor in above):
        raise UserError(f"{place}: an anchor that refers to itself")
    if len(above) >= DEPTH:
        raise UserError(f"{place}: nested too deeply; allowed: {DEPTH} levels")
    total, inside = 1, (*above, node)
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":int") and len(node.value) > DIGITS:
            raise UserError(f"{place}: an integer of {len(node.value):,} digits; allowed: {DIGITS}")
        if node.tag.endswith((":int", ":float")) and OTHER_BASE.match(node.value):
            raise UserError(
                f"{place}: {node.value}, which YAML reads to base 8 (a 0 before the number) or 60 (a colon); "
                "allowed: a decimal number, or a text in quotes"
            )
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_measure(item, where, inside, sizes) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys and key.tag != "tag:yaml.org,2002:merge":
                    line = key.start_mark.line + 1
                    raise UserError(f"{where} line {line}: key {key.value!r} is given twice")
                keys.add(key.value)
            total += _measure(key, where, inside, sizes) + _measure(value, where, inside, sizes)
    if total > NODES:
        raise UserError(f"{place}: more than {NODES:,} values once its anchors are written out")
    sizes[id(node)] = total
    return total
