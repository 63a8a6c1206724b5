"""Parsing of the flags of ``train``, ``cache`` and ``estimate``: dotted fields and other tools' names. No
torch.

argparse cannot declare a dotted flag of a method (``--method.time.low 0.3``) without importing the method.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffalign.cli.aliases import ALIASES
from diffalign.cli.foreign_keys import refuse_foreign_keys
from diffalign.cli.presets import LATE, choose, defaults, late
from diffalign.config.files import find_config, merge, read_yaml
from diffalign.config.io import apply_overrides, dotted_names, field_kind, from_dict, is_switch, to_dict
from diffalign.config.reward_schema import AnyRun
from diffalign.config.schema import Run
from diffalign.errors import UserError, close_to
from diffalign.runs.validate import validate

LONG_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"
"""Dashes that programs put in place of hyphens."""


@dataclass(frozen=True)
class Flags:
    """The flags of a command line.

    Attributes:
        config: file or recipe, or None.
        overrides: ``--a.b=text`` in order, other tools' names translated.
        late: texts of the flags that depend on the rest of the run.
        switches: which of the command's own switches are set.
        given: names of other tools' flags, in order.
        script: value of ``--flags``, the script whose defaults are taken; "" to guess.
        twice: notes on fields that were given two values.
    """

    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    late: Mapping[str, list[str]] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    given: tuple[str, ...] = ()
    script: str = ""
    twice: tuple[str, ...] = ()


def read_flags(argv: Sequence[str], own_switches: Sequence[str] = ()) -> Flags:
    """Return the flags of a command line.

    Raises:
        UserError: an unknown flag, a value missing, or two configs.
    """
    words, flags, later = list(argv), Flags(), dict[str, list[str]]()
    origins: dict[str, list[tuple[str, str]]] = {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") and len(word) > 1:
                raise UserError(f"unknown option {word!r}; options are written --name")
            flags = _with_config(flags, word)
            continue
        name, equals, text = word[2:].partition("=")
        if name in own_switches:
            flags = replace(flags, switches=flags.switches | {name})
            continue
        texts = [text] if equals else _values(name, words)
        if name == "config":
            flags = _with_config(flags, texts[0])
        elif name == "flags":
            flags = replace(flags, script=texts[0])
        for target, value in (pair for text in texts for pair in _translate(name, text)):
            origins.setdefault(target, []).append((name, value))
            if target in LATE:
                later.setdefault(target, []).append(value)
            else:
                flags.overrides.append(f"--{target}={value}")
        if name in ALIASES:
            flags = replace(flags, given=(*flags.given, name))
    return replace(flags, late=later, twice=tuple(_told_twice(origins)))


def _told_twice(origins: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    """Yield a note for each field that flags give different values."""
    for target, given in origins.items():
        name, value = given[-1]
        several = name in ALIASES and ALIASES[name].many and not ALIASES[name].joined
        others = [f"--{other} {text}" for other, text in given[:-1] if text != value]
        if others and not several:
            yield f"{target} is given more than once: {', '.join(others)}; --{name} {value}, the last, holds"


def resolve(flags: Flags, needs: Sequence[str] = ()) -> tuple[Run, list[str]]:
    """Return the validated run of the flags, and notes to print.

    Raises:
        UserError: anything wrong with the config or a flag.
    """
    file = None if flags.config is None else find_config(flags.config)
    data = {} if file is None else read_yaml(file)
    where = flags.config or "the configuration"
    refuse_foreign_keys(data, where)
    run = apply_overrides(from_dict(data, where), flags.overrides)
    preset, note = choose(flags.given, flags.script, flags.config)
    notes = [*flags.twice, *([note] if note else [])]
    if preset:
        pairs, more = defaults(preset, run, flags.given)
        below = to_dict(apply_overrides(Run(), _as_flags(pairs)))
        run = apply_overrides(from_dict(merge(below, data), where), flags.overrides)
        notes += more
    notes += [
        f"--{name} has no effect: {n}" for name in dict.fromkeys(flags.given) if (n := ALIASES[name].note)
    ]
    stepped = any(word.startswith(("--training.steps=", "--training.epochs=")) for word in flags.overrides)
    pairs, more = late(run, flags.late, preset, stepped)
    # An explicit field has precedence over what a late flag only implies: --validation_steps 50
    # --run_validation.
    run = apply_overrides(run, _as_flags(pairs))
    if file is not None and not any(word.startswith("--output=") for word in flags.overrides):
        run, moved = in_its_folder(run, file)
        more = [*more, *moved]
    validate(run, needs)
    return run, [*notes, *more]


def in_its_folder(run: AnyRun, config: Path) -> tuple[AnyRun, list[str]]:
    """Return a run of ``config``, with the output that it goes on in, and a note where it is another one.

    The record of a run names the folder that it was made in, which may have been moved or copied since.
    """
    own = config.absolute().parent
    is_record = config.name == "config.yaml" and (own / "checkpoints").is_dir()
    if not is_record or own.resolve() == Path(run.output).resolve():
        return run, []
    note = f"the run goes on in {own}, where its config.yaml lies; it was made in {run.output}"
    return replace(run, output=str(own)), [note]


def _as_flags(pairs: Sequence[tuple[str, str]]) -> list[str]:
    return [f"--{target}={value}" for target, value in pairs]


def _with_config(flags: Flags, name: str) -> Flags:
    if name[:1] in LONG_DASHES:
        raise UserError(
            f"{name!r} begins with a dash of a word processor; options are written with two hyphens, "
            f"--{name.lstrip(LONG_DASHES + '-')}"
        )
    if flags.config is not None:
        raise UserError(f"two configs, {flags.config!r} and {name!r}; allowed: one")
    return replace(flags, config=name)


def _values(name: str, words: list[str]) -> list[str]:
    """Take the values of a flag written without ``=``; switches have none, unless true or false follows."""
    _refuse_unknown(name)
    follows = bool(words) and not words[0].startswith("--")
    if _is_switch(name):
        spelt = follows and (words[0].lower() in ("true", "false") or _takes_number(name, words[0]))
        return [words.pop(0) if spelt else ("true" if name not in ALIASES else "")]
    if not follows:
        raise UserError(f"--{name} needs a value")
    found = [words.pop(0)]
    while name in ALIASES and ALIASES[name].many and words and not words[0].startswith("--"):
        found.append(words.pop(0))
    return [",".join(found)] if name in ALIASES and ALIASES[name].joined else found


def _is_switch(name: str) -> bool:
    if name in ALIASES:
        return ALIASES[name].switch
    return _is_field(name) and is_switch(field_kind(name))


def _takes_number(name: str, word: str) -> bool:
    """Whether a word is the number of a switch that takes one, such as every N-th block."""
    return name not in ALIASES and field_kind(name) is not bool and word.lstrip("-")[:1].isdigit()


def _is_field(name: str) -> bool:
    return name.startswith("method.") or "." in name or name in dotted_names()


def _refuse_unknown(name: str) -> None:
    if name not in ALIASES and name not in _OWN and not _is_field(name):
        close = close_to(f"--{name}", [f"--{n}" for n in (*dotted_names(), *ALIASES, *_OWN)])
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UserError(f"unknown option '--{name}'; {hint}allowed: the options that --help lists")


def _translate(name: str, text: str) -> list[tuple[str, str]]:
    _refuse_unknown(name)
    if name in _OWN:
        return []
    if name in ALIASES:
        return ALIASES[name].convert(text)
    field_kind(name)  # names the nearest fields if there is no such one
    return [(name, text)]


_OWN = ("config", "flags")
"""Flags that are no field: the configuration file, and the script whose flags are given."""
