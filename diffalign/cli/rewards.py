"""``diffalign rewards``: the rewards that score images and videos."""

from collections.abc import Sequence
from typing import Any

from diffalign.cli.common import as_mapping, make_parser, parse, print_json, table

FIELDS = (
    "name", "title", "range", "licence", "size", "checkpoint", "source", "notes", "differentiable", "video",
    "edits", "reads_prompt", "per_prompt", "needs",
)  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """List the rewards, or describe one."""
    parser = make_parser("rewards", "List the rewards, or say more about one.", EXAMPLES)
    parser.add_argument("name", nargs="?", help="one reward")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args = parse(parser, argv)

    from diffalign.errors import unknown
    from diffalign.rewards.registry import REGISTRY

    if args.name is not None and args.name not in REGISTRY:
        raise unknown("reward", args.name, REGISTRY)
    cards = [card for name, card in sorted(REGISTRY.items()) if args.name in (None, name)]
    if args.json:
        print_json([as_mapping(card, FIELDS) for card in cards])
    elif args.name is None:
        print(
            table(
                [(c.name, c.title, c.range, c.size) for c in cards],
                ("name", "title", "usual range", "download"),
            )
        )
        print("\nWeights of your own: NAME:FILE_OR_FOLDER. `diffalign rewards NAME` says more.")
    else:
        facts = {name: getattr(cards[0], name) for name in FIELDS}
        print(
            "\n".join(
                f"{name}: {_shown(value)}" for name, value in facts.items() if value not in ("", (), None)
            )
        )
        source = f":{cards[0].source}" if cards[0].source else ""
        folder = "videos" if cards[0].video else "images"
        prompts = "edits.jsonl" if cards[0].edits else "prompts.txt"  # a source image beside each prompt
        print(f"example: diffalign score {folder}/ --rewards {cards[0].name}{source} --prompts {prompts}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


EXAMPLES = """
diffalign rewards
diffalign rewards pickscore
diffalign rewards --json
"""
