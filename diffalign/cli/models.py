"""``diffalign models``: the model families, and how their checkpoints are named."""

from collections.abc import Sequence

from diffalign.cli.common import as_mapping, make_parser, parse, print_json, table

FIELDS = ("name", "title", "pipeline", "resolution", "example")


def run(argv: Sequence[str]) -> int:
    """Lists the model families."""
    parser = make_parser(
        "models", "List the model families that can be trained.", "diffalign models\ndiffalign models --json"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parse(parser, argv)

    from diffalign.models.families.registry import FAMILIES
    from diffalign.tiny import FAMILIES as TINY

    cards = [FAMILIES[name] for name in sorted(FAMILIES)]
    if args.json:
        print_json([as_mapping(card, FIELDS) for card in cards])
        return 0
    rows = [(c.name, c.title, f"{c.resolution} px", c.pipeline, c.example) for c in cards]
    print(table(rows, ("name", "title", "trained at", "diffusers pipeline", "example (hub id)")))
    print(
        "\nmodel.path: a hub id, a diffusers folder, a .safetensors or .ckpt file, or an embedded tiny model,"
    )
    print("  " + ", ".join(f"tiny:{name}" for name in TINY))
    return 0
