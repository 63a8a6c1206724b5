"""``diffalign models``: the model families, with names of checkpoints."""

from collections.abc import Sequence
from typing import Any

from diffalign.cli.common import as_mapping, make_parser, parse, print_json, table
from diffalign.config.files import shipped_configs

FIELDS = ("name", "title", "pipeline", "resolution", "example")


def run(argv: Sequence[str]) -> int:
    """List the model families, or describe one."""
    parser = make_parser("models", "List the model families that can be trained, or describe one.", EXAMPLES)
    parser.add_argument("name", nargs="?", help="one family")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parse(parser, argv)

    from diffalign.errors import unknown
    from diffalign.models.families.registry import FAMILIES
    from diffalign.tiny import FAMILIES as TINY

    if args.name is not None and args.name not in FAMILIES:
        raise unknown("model family", args.name, FAMILIES)
    cards = [FAMILIES[name] for name in sorted(FAMILIES) if args.name in (None, name)]
    if args.json:
        print_json([as_mapping(card, FIELDS) for card in cards])
        return 0
    if args.name is not None:
        print("\n".join(describe(cards[0])))
        return 0
    rows = [(c.name, c.title, f"{c.resolution} px", c.pipeline, c.example) for c in cards]
    print(table(rows, ("name", "title", "trained at", "diffusers pipeline", "example (hub id)")))
    print(
        "\nmodel.path: a hub id, a diffusers folder, a .safetensors or .ckpt file, or an embedded tiny model,"
    )
    print("  " + ", ".join(f"tiny:{name}" for name in TINY))
    return 0


def describe(card: Any) -> list[str]:
    """Return the lines about one family: what it is, known checkpoints, recipes and an example."""
    known = [*card.same_shapes, *(hub_id for hub_id, _ in card.other_shapes)]
    recipes = [name for name in shipped_configs() if f"_{name}".startswith(f"_{card.name}_")]
    recipes += [name for name in shipped_configs() if name.startswith(f"tiny_{card.name}_")]
    lines = [
        f"{card.title} ({card.name})",
        f"diffusers pipeline: {card.pipeline}",
        f"trained at: {card.resolution} px",
        f"known checkpoints: {', '.join(known)}" if known else "",
        f"single files: {'read' if card.single_file_key else 'not read'}",
        f"recipes: {', '.join(recipes) or 'none of its own'}",
        "example:",
        f"  diffalign train --model.path {card.example} --data.path pairs.parquet --output runs/{card.name}",
    ]
    return [line for line in lines if line]


EXAMPLES = """
diffalign models
diffalign models sdxl
diffalign models --json
"""
