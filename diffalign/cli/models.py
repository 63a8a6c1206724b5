"""``diffalign models``: the model families, with names of checkpoints."""

from collections.abc import Sequence
from typing import Any

from diffalign.cli.common import as_mapping, make_parser, parse, print_json, table
from diffalign.config.recipes import Recipe, recipes

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
    print("recipes of a family, with the GPUs that each is for: diffalign models NAME")
    return 0


def describe(card: Any) -> list[str]:
    """Return the lines about one family: what it is, known checkpoints, recipes and an example."""
    from diffalign.models.families.video_cards import VIDEOS

    known = [*card.same_shapes, *(hub_id for hub_id, _ in card.other_shapes)]
    mine = [recipe for recipe in recipes() if recipe.family == card.name]
    real = [recipe for recipe in mine if not recipe.name.startswith("tiny_")]
    real.sort(key=lambda recipe: (recipe.size, recipe.name))
    tiny = [recipe.name for recipe in mine if recipe not in real]
    run = real[0].name if real else f"--model.path {card.example}"
    kind = "the first frame of the video" if card in VIDEOS else "the image that is edited"
    lines = [
        f"{card.title} ({card.name})",
        f"diffusers pipeline: {card.pipeline}",
        f"trained at: {card.resolution} px",
        f"known checkpoints: {', '.join(known)}" if known else "",
        f"source image: {SOURCES[card.source].format(kind)}",
        f"single files: {'read' if card.single_file_key else 'not read'}",
        "recipes:" if real else "recipes: none of its own",
        *_listed(real),
        f"embedded tiny model: {', '.join(tiny)}" if tiny else "",
        "example:",
        *((f"  {command}" for command in real[0].commands) if real else [f"  diffalign train {run} {GIVEN}"]),
        "a smaller card, before anything is loaded:",
        f"  diffalign estimate {run} --fits 24",
    ]
    return [line for line in lines if line]


def _listed(found: list[Recipe]) -> list[str]:
    """Return a line for each recipe: name, GPUs, title."""
    if not found:
        return []
    rows = [(f"  {r.name}", r.gpus, r.title.rstrip(".")) for r in found]
    return table(rows, ("  name", "GPUs", "")).splitlines()


GIVEN = "--data.path pairs.parquet --output runs/mine"

SOURCES = {
    "": "refused",
    "taken": "taken, {}; also trained from text alone (docs/howto/edit_pairs.md)",
    "needed": "needed, {} (docs/howto/edit_pairs.md)",
}
"""Meaning of ``FamilyCard.source``; the kind of the source is filled in."""

EXAMPLES = """
diffalign models
diffalign models sdxl
diffalign models --json
"""
