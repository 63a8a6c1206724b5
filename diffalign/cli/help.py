"""The help of ``train``, made from the ``Run`` tree (names, defaults, help texts) and the alias table."""

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from diffalign.cli.aliases import ALIASES
from diffalign.config.fields import options
from diffalign.config.schema import Run

USAGE = """\
usage: diffalign train [CONFIG | --config CONFIG] [--a.b VALUE ...] [--print-config]

Align a model with preferences. CONFIG is a YAML file or the name of a shipped recipe; flags override it,
and can also do without it. Unknown names are errors that name the nearest ones.

  --resume latest   continue a run from its newest checkpoint, exactly
  --output FOLDER   the run directory
  --print-config    print the resolved configuration as YAML and stop

examples:
  diffalign train tiny_sdxl_dpo --output runs/tiny
  diffalign train sdxl_dpo_lora_24gb --data.path pairs.parquet --output runs/mine
  diffalign train runs/mine/config.yaml --resume latest
  diffalign train sdxl_dpo_lora --method.beta 2000 --method.loss.type ipo --model.lora.rank 32
  diffalign train --model.path tiny:sdxl --data.path tiny:pairs --data.resolution 32 --training.steps 20
  accelerate launch -m diffalign train sdxl_dpo_lora
  torchrun --nproc-per-node 4 -m diffalign train sdxl_dpo_lora
"""

METHOD = """\
method: another method by name, or fields of the method (`diffalign methods NAME` lists them)
  --method NAME             dpo
  --method.FIELD VALUE      --method.beta 2000, --method.loss.type ipo,
                            --method.time '{type: uniform, low: 0.3}'
"""


def train_help() -> str:
    """Return the whole help text."""
    parts = [USAGE, METHOD, *sections(Run)]
    parts.append(
        "flags of diffusers' and Salesforce's DPO scripts, and of TRL:\n"
        "  --flags NAME takes the defaults of a script: diffusers, salesforce, trl, none. Without it a flag\n"
        "  that is one script's own decides. A note at the start lists the defaults and what still differs.\n"
        "  --beta_dpo has the paper's 1/2; diffusers' SD 1.x script leaves it out, so its flag is doubled.\n"
        + _lines((name, "", alias.meaning) for name, alias in ALIASES.items())
    )
    return "\n".join(parts)


def sections(tree: Any, hidden: Iterable[str] = ("method",)) -> Iterator[str]:
    """Yield the fields of a tree of dataclasses by section, but those that start with ``hidden``."""
    shown = lambda found: (row for row in found if not row[0].startswith(tuple(hidden)))  # noqa: E731
    yield "run:\n" + _lines(row for row in shown(rows(tree, "")) if "." not in row[0])
    for field in dataclasses.fields(tree):
        kind = get_type_hints(tree)[field.name]
        if dataclasses.is_dataclass(kind):
            yield (
                f"{field.name}: {(inspect.getdoc(kind) or '').splitlines()[0]}\n"
                + _lines(shown(rows(kind, field.name + ".")))
            )


def rows(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, default, words) for every option of a dataclass; at the top, for its own alone."""
    for name, field, kind in options(cls):
        if not prefix and "." in name:
            continue
        words = [field.metadata.get("help", "")]
        if get_origin(kind) is Literal:
            words.insert(0, "|".join(map(str, get_args(kind))))
        yield prefix + name, _shown(field.default), "; ".join(word for word in words if word)


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _lines(items: Any) -> str:
    out = []
    for name, default, words in items:
        head = f"  --{name} {default}".rstrip()
        pad = f"{head:<42}" if len(head) < 41 else f"{head}  "
        out += textwrap.wrap(
            f"{pad}{words}".rstrip(), 110, subsequent_indent=" " * 42, drop_whitespace=True
        ) or [head]
    return "\n".join(out) + "\n"
