"""``diffalign push``: upload a run's result to the Hugging Face hub."""

import sys
from collections.abc import Sequence

from diffalign.cli.common import make_parser, parse


def run(argv: Sequence[str]) -> int:
    """Upload and print the address."""
    parser = make_parser("push", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a run directory, an aligned/ folder or a LoRA")
    parser.add_argument("repo", help="ORG/NAME on the hub; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="where the repository is new")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--license", help="of the base model; default: what its card on the hub says")
    parser.add_argument("--base", metavar="MODEL", help="base model of a LoRA outside of its run")
    args = parse(parser, argv)
    from diffalign.runs.publish import push

    address = push(
        args.model,
        args.repo,
        private=args.private,
        revision=args.revision,
        license=args.license,
        base=args.base,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(address)
    return 0


DESCRIPTION = """\
Upload a run's aligned/ to the Hugging Face hub with a model card (figures, base, licence, settings) and the
pictures of its last validation. Log in with `hf auth login` first. Files that the hub has are not sent
again."""

EXAMPLES = """
diffalign push runs/mine me/sdxl-dpo --private
diffalign push runs/mine me/sdxl-dpo --revision step-2000
"""
