"""Reads the flags of ``train``, ``cache`` and ``estimate``: dotted fields and other tools' names. No torch.

argparse is not asked, because a dotted flag of a method (``--method.time.low 0.3``) cannot be declared
without importing it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from diffalign.cli.aliases import ALIASES, late
from diffalign.config.files import find_config, read_yaml
from diffalign.config.io import (
    apply_overrides,
    dotted_names,
    field_kind,
    from_dict,
)
from diffalign.config.schema import Run
from diffalign.errors import UserError, unknown
from diffalign.runs.validate import validate

LATE = ("beta_dpo", "beta1", "beta2", "run_validation", "validation_prompt")


@dataclass(frozen=True)
class Flags:
    """What the command line said.

    Attributes:
        config: file or recipe, or None.
        overrides: ``--a.b=text`` in order, other tools' names translated.
        late: texts of the flags that depend on the rest of the run.
        switches: which of the command's own switches are set.
    """

    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    late: Mapping[str, list[str]] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()


def read_flags(argv: Sequence[str], own_switches: Sequence[str] = ()) -> Flags:
    """The flags of a command line.

    Raises:
        UserError: an unknown flag, a value missing, or two configs.
    """
    words, flags, later = list(argv), Flags(), dict[str, list[str]]()
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and len(word) > 1:
                raise UserError(f"unknown option {word!r}; options are written --name")
            if flags.config is not None:
                raise UserError(f"two configs, {flags.config!r} and {word!r}; allowed: one")
            flags = replace(flags, config=word)
            continue
        name, equals, text = word[2:].partition("=")
        if name in own_switches:
            flags = replace(flags, switches=flags.switches | {name})
            continue
        if not equals:
            text = _value(name, words)
        for target, value in _translate(name, text):
            if target in LATE:
                later.setdefault(target, []).append(value)
            else:
                flags.overrides.append(f"--{target}={value}")
    return replace(flags, late=later)


def resolve(flags: Flags, needs: Sequence[str] = ()) -> tuple[Run, list[str]]:
    """The validated run that flags stand for, and notes to print.

    Raises:
        UserError: anything wrong with the config or a flag.
    """
    run = Run()
    if flags.config is not None:
        run = from_dict(read_yaml(find_config(flags.config)), flags.config)
    run = apply_overrides(run, flags.overrides)
    pairs, notes = late(run, flags.late)
    # An explicit field beats what a late flag only implies: --validation_steps 50 --run_validation.
    run = apply_overrides(run, [f"--{target}={value}" for target, value in pairs])
    validate(run, needs)
    return run, notes


def _value(name: str, words: list[str]) -> str:
    """The value of a flag written without ``=``; switches have none, unless true or false follows."""
    follows = bool(words) and not words[0].startswith("--")
    if _is_switch(name):
        spelt = follows and words[0].lower() in ("true", "false")
        return words.pop(0) if spelt else ("true" if name not in ALIASES else "")
    if not follows:
        raise UserError(f"--{name} needs a value")
    return words.pop(0)


def _is_switch(name: str) -> bool:
    if name in ALIASES:
        return ALIASES[name].switch
    return _is_field(name) and field_kind(name) is bool


def _is_field(name: str) -> bool:
    return name.startswith("method.") or "." in name or name in dotted_names()


def _translate(name: str, text: str) -> list[tuple[str, str]]:
    if name in ALIASES:
        return ALIASES[name].convert(text)
    if _is_field(name):
        field_kind(name)  # names the nearest fields if there is no such one
        return [(name, text)]
    raise unknown("option", f"--{name}", [f"--{n}" for n in (*dotted_names(), *ALIASES)])
