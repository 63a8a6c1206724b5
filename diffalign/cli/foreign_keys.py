"""Keys of a configuration file that other training scripts have as flags."""

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from diffalign.cli.aliases import ALIASES
from diffalign.config.io import dotted_names
from diffalign.config.schema import Run
from diffalign.errors import UserError


def refuse_foreign_keys(data: Mapping[str, Any], where: str) -> None:
    """Check that no key of a configuration is a flag of another tool, which is a flag here as well.

    Raises:
        UserError: some are; it names the place of each.
    """
    found = dict(_foreign(data, Run))
    if not found:
        return
    fields = set(dotted_names())
    listed = ", ".join(f"{key} ({_place(name)})" for key, name in found.items())
    exact = next((key for key, name in found.items() if ALIASES[name].meaning in fields), None)
    example = ""
    if exact is not None:
        section, dot, field = ALIASES[found[exact]].meaning.rpartition(".")
        nested = f"{{{field}: ...}}"
        for part in reversed(section.split(".")[1:]):
            nested = f"{{{part}: {nested}}}"
        example = f"such as {section.split('.')[0]}: {nested}" if dot else f"such as {field}: ..."
    given = next(iter(found.values()))
    raise UserError(
        f"keys in {where} that are flags of other scripts, with what each is here: {listed}; allowed in "
        f"YAML: the names here, nested by section{', ' + example if example else ''}; or the flag, --{given}"
    )


def _place(name: str) -> str:
    return ALIASES[name].meaning.replace("; see above", ", in the unit that --help tells")


def _foreign(data: Mapping[str, Any], cls: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, alias) of the keys that the tree does not have and another tool has as a flag."""
    kinds = get_type_hints(cls)
    for key, value in data.items():
        if key not in kinds and key in ALIASES:
            yield f"{prefix}{key}", key
        elif is_dataclass(kinds.get(key)) and isinstance(value, Mapping):
            yield from _foreign(value, kinds[key], f"{prefix}{key}.")
