"""``diffalign methods``: what can be done with preferences, with paper, defaults and an example."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffalign.cli.common import as_mapping, make_parser, parse, print_json, table

FIELDS = ("name", "title", "paper", "year", "arxiv", "data", "cost")


def run(argv: Sequence[str]) -> int:
    """Lists the methods, or says all about one."""
    parser = make_parser("methods", "List the methods, or say more about one.", EXAMPLES)
    parser.add_argument("name", nargs="?", help="one method")
    parser.add_argument("--json", action="store_true", help="machine-readable, with default values")
    args = parse(parser, argv)

    from diffalign.errors import unknown
    from diffalign.methods import REGISTRY

    if args.name is not None and args.name not in set(REGISTRY):
        raise unknown("method", args.name, REGISTRY)
    cards = [REGISTRY[name] for name in sorted(REGISTRY) if args.name in (None, name)]
    if args.json:
        print_json([{**as_mapping(card, FIELDS), "defaults": defaults(card.method)} for card in cards])
    elif args.name is None:
        rows = [(c.name, c.title, str(c.year), f"arXiv {c.arxiv}", c.data) for c in cards]
        print(table(rows, ("name", "title", "year", "paper", "learns from")))
        print("\n`diffalign methods NAME` says more.")
    else:
        print(describe(cards[0]))
    return 0


def describe(card: Any) -> str:
    """Everything about one method."""
    lines = [f"{card.title} ({card.name})", f"{card.paper}, {card.year}, arXiv {card.arxiv}", ""]
    lines += [
        f"learns from: {card.data}",
        f"cost of a group and step: {card.cost}",
        "",
        "fields (under `method:`):",
    ]
    lines += [f"  {name}: {value}" for name, value in defaults(card.method).items()]
    return "\n".join(
        [
            *lines,
            "",
            "example:",
            f"  diffalign train tiny_sdxl_dpo --method {card.name} --output runs/{card.name}",
        ]
    )


def defaults(method: type) -> dict[str, Any]:
    """The fields of a method and their default values, nested ones as mappings; state is no setting."""
    return {f.name: _plain(f.default) for f in dataclasses.fields(method) if f.repr}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__.lower(), **fields}
    return value


EXAMPLES = """
diffalign methods
diffalign methods dpo
diffalign methods --json
"""
