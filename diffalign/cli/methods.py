"""``diffalign methods``: the methods, with paper, defaults and an example."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffalign.cli.common import as_mapping, make_parser, parse, print_json
from diffalign.config.recipes import recipes

FIELDS = ("name", "title", "paper", "year", "arxiv", "data", "cost")
STRATEGY_FIELDS = ("name", "title", "paper", "year", "arxiv", "composes", "cost")


def run(argv: Sequence[str]) -> int:
    """List the methods, or describe one."""
    parser = make_parser("methods", "List the methods, or say more about one.", EXAMPLES)
    parser.add_argument("name", nargs="?", help="one method")
    parser.add_argument("--json", action="store_true", help="machine-readable, with default values")
    args = parse(parser, argv)

    from diffalign.errors import unknown
    from diffalign.methods import REGISTRY
    from diffalign.strategies import STRATEGIES

    if args.name is not None and args.name not in {*REGISTRY, *STRATEGIES}:
        raise unknown("method or strategy", args.name, [*REGISTRY, *STRATEGIES])
    cards = [REGISTRY[name] for name in sorted(REGISTRY) if args.name in (None, name)]
    around = [STRATEGIES[name] for name in sorted(STRATEGIES) if args.name in (None, name)]
    if args.json:
        rows = [{**as_mapping(c, FIELDS), "kind": "method", "defaults": defaults(c.method)} for c in cards]
        print_json(
            rows
            + [
                {**as_mapping(c, STRATEGY_FIELDS), "kind": "strategy", "defaults": defaults(c.strategy)}
                for c in around
            ]
        )
    elif args.name is None:
        print("\n\n".join(entry(card) for card in cards))
        print("\nstrategies, around any method (`strategies: [{type: NAME, ...}]`):\n")
        print("\n\n".join(strategy_entry(card) for card in around))
        print("\n`diffalign methods NAME` says more.")
    else:
        print("\n\n".join([describe(card) for card in cards] + [describe_strategy(card) for card in around]))
    return 0


def strategy_entry(card: Any) -> str:
    """Return a strategy's entry in the list: name, paper, methods that it composes with, cost, defaults."""
    values = ", ".join(f"{name} {_short(value)}" for name, value in defaults(card.strategy).items())
    return (
        f"{card.name}: {card.title} ({card.year}, {card.source})\n"
        f"    composes with {card.composes}; costs beside the method's: {card.cost}\n    {values}"
    )


def describe_strategy(card: Any) -> str:
    """Return the lines about one strategy."""
    fields = [f"  {name}: {value}" for name, value in defaults(card.strategy).items()]
    return "\n".join(
        [
            f"{card.title} ({card.name}, a strategy)",
            f"{card.paper}, {card.year}, {card.source}",
            "",
            f"composes with: {card.composes}",
            f"cost of a group and step beside the method's: {card.cost}",
            "",
            f"fields (in `strategies: [{{type: {card.name}, ...}}]`):",
            *fields,
            "",
            "example:",
            f"  diffalign train tiny_sdxl_dpo --strategies {card.name} --output runs/{card.name}",
        ]
    )


def entry(card: Any) -> str:
    """Return a method's entry in the list: name, paper, data, cost, defaults."""
    values = ", ".join(
        f"{name} {_short(value)}" for name, value in defaults(card.method).items() if value != {}
    )
    return (
        f"{card.name}: {card.title} ({card.year}, {card.source})\n"
        f"    learns from {card.data}; a group costs {card.cost}\n    {values}"
    )


def describe(card: Any) -> str:
    """Return the lines about one method."""
    lines = [f"{card.title} ({card.name})", f"{card.paper}, {card.year}, {card.source}", ""]
    lines += [
        f"learns from: {card.data}",
        f"cost of a group and step: {card.cost}",
        "",
        "fields (under `method:`):",
    ]
    lines += [f"  {name}: {value}" for name, value in defaults(card.method).items()]
    mine = [recipe.name for recipe in recipes() if recipe.method == card.name]
    tiny = f"tiny_sdxl_{card.name}"
    command = (
        f"diffalign train {tiny}" if tiny in mine else f"diffalign train tiny_sdxl_dpo --method {card.name}"
    )
    return "\n".join(
        [
            *lines,
            "",
            f"recipes: {', '.join(mine) or 'none of its own'}",
            "example:",
            f"  {command} --output runs/{card.name}",
        ]
    )


def defaults(method: type) -> dict[str, Any]:
    """Return the fields of a method and their default values, as a configuration would give them."""
    from diffalign.methods._base import own_first

    return {f.name: _plain(f, _default(f)) for f in own_first(method) if f.init and f.compare}


def _default(field: "dataclasses.Field[Any]") -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _plain(field: "dataclasses.Field[Any]", value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    inner = {f.name: _plain(f, getattr(value, f.name)) for f in dataclasses.fields(value)}
    names = [name for name, cls in field.metadata.get("choices", {}).items() if cls is type(value)]
    return {"type": names[0], **inner} if names else inner


def _short(value: Any) -> Any:
    """Return a component by its name alone."""
    return value["type"] if isinstance(value, dict) else value


EXAMPLES = """
diffalign methods
diffalign methods dpo
diffalign methods --json
"""
