"""``diffalign pairs``: preference pairs or ranked lists from scores, ready to train on."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import make_parser, names, number, output_file, parse, print_json
from diffalign.cli.scoring import add_scoring_options, beside, scorers_of, show_unreadable
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.preferences.from_scores.candidates import Candidates, MediaStore
    from diffalign.rewards.combine import How
    from diffalign.rewards.specs import Weighted

CHOICES = ("best-worst", "top-bottom", "all", "list")


def run(argv: Sequence[str]) -> int:
    """Make and write the pairs; print their number, and the numbers and reasons of dropped ones."""
    args = read(argv)
    output = Path(args.output)

    from diffalign.preferences.from_scores.choose import Rules
    from diffalign.preferences.from_scores.make import Scoring, make
    from diffalign.preferences.from_scores.write import write
    from diffalign.rewards.specs import weighted

    rewards = [weighted(text) for text in names(args.rewards, "--rewards")] if args.rewards else []
    rules = Rules(args.choose, args.top, args.margin, args.tie, args.ties == "keep", args.max_pairs)
    with _candidates(args, rewards) as (found, store):
        how: How = args.combine or ("rank" if len(found.rewards) > 1 else "sum")
        scoring = Scoring(tuple(reward.weight for reward in rewards), how, args.standardise)
        made = make(found, rules, scoring, args.dedup, 8 if args.near is None else args.near)
        write(made, output, store)
    show_unreadable(made.unreadable)
    if args.json:
        print_json({**made.counts, "rewards": list(made.rewards), "combine": how, "output": str(output)})
    else:
        by = ", ".join(made.rewards) + (f" by {how}" if len(made.rewards) > 1 else "")
        print(f"{made.text}\nscores: {by}")
    frames = " --data.frames N" if made.groups[0].rivals[0].is_video else ""
    print(
        f"train on them: diffalign train CONFIG --data.path {shlex.quote(str(output))}{frames}",
        file=sys.stderr,
    )
    return 0


@contextmanager
def _candidates(
    args: argparse.Namespace, rewards: "Sequence[Weighted]"
) -> "Iterator[tuple[Candidates, MediaStore]]":
    """Yield the scored images or videos, from a table of scores or after scoring them."""
    from diffalign.data.prompts.prompt_sets import read_prompts
    from diffalign.preferences.from_scores.candidates import (
        MediaStore,
        from_table,
        is_score_table,
        scored_now,
    )
    from diffalign.rewards.scoring.items import read_items

    source, near = Path(args.source), args.dedup == "near"
    with MediaStore() as store:
        if is_score_table(source):
            for name in ("prompts", "cache"):
                if (value := getattr(args, name)) is not None:
                    raise UserError(
                        f"--{name} {value!r} is for images that are still to be scored; {args.source!r} has "
                        "scores and prompts"
                    )
            chosen = [reward.name for reward in rewards]
            yield from_table(source, chosen, store, limit=args.limit, near=near), store
            return
        if not rewards:
            raise UserError(
                f"{args.source!r} is no table of `diffalign score`, so --rewards must say what to score by"
            )
        items = islice(read_items(source, read_prompts(args.prompts) if args.prompts else None), args.limit)
        cache = beside(source, "score-cache.sqlite")
        with scorers_of(args, [reward.spec for reward in rewards], cache) as (scorers, kept):
            found = scored_now(items, scorers, kept, store, near=near)
        yield found, store


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("pairs", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source", help="a table made by `diffalign score`, or anything that it scores (with --rewards)"
    )
    parser.add_argument(
        "--output",
        type=output_file,
        required=True,
        metavar="FILE",
        help=".parquet (images), or .jsonl (paths)",
    )
    parser.add_argument(
        "--rewards", metavar="A,B", help="rewards with weights, as 0.5*pickscore; default: all of the table"
    )
    parser.add_argument(
        "--combine",
        choices=("sum", "rank", "wins"),
        help="several rewards: weighted sum, mean rank among rivals, share of won comparisons; default rank",
    )
    parser.add_argument(
        "--standardise", action="store_true", help="each reward to mean 0 and std 1 over all images first"
    )
    which = parser.add_argument_group("which pairs")
    which.add_argument("--choose", choices=CHOICES, default=CHOICES[0], help="default best-worst")
    which.add_argument(
        "--top", type=number(int, 1), default=1, metavar="K", help="of top-bottom: K best against K worst"
    )
    which.add_argument(
        "--margin", type=number(float, 0), default=0.0, metavar="X", help="scores differ by X or more"
    )
    which.add_argument(
        "--tie", type=number(float, 0), default=0.0, metavar="X", help="scores that differ by at most X tie"
    )
    which.add_argument("--ties", choices=("drop", "keep"), default="drop", help="default drop")
    which.add_argument(
        "--max-pairs", type=number(int, 1), metavar="N", help="of a prompt: those with the largest difference"
    )
    which.add_argument(
        "--dedup",
        choices=("exact", "near", "none"),
        default="exact",
        help="images of a prompt that are equal in bytes, or nearly so in looks; default exact",
    )
    which.add_argument(
        "--near",
        type=number(int, 0, 255),
        metavar="L",
        help="near: 16 x 16 thumbnails differ nowhere by more than L levels of 255; default 8",
    )
    parser.add_argument("--prompts", metavar="FILE", help="for a folder without captions, as for score")
    add_scoring_options(parser, "score-cache.sqlite in, or beside, the source")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = parse(parser, argv)
    if Path(args.output).suffix not in (".parquet", ".jsonl"):
        raise UserError(f"--output {args.output!r}: the name must end in .parquet or .jsonl")
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)  # raises before anything is scored
    if args.top != 1 and args.choose != "top-bottom":
        raise UserError(f"--top {args.top} is for --choose top-bottom, not {args.choose}")
    if args.near is not None and args.dedup != "near":
        raise UserError(f"--near {args.near} is for --dedup near, not {args.dedup}")
    if args.max_pairs and args.choose == "list":
        raise UserError(f"--max-pairs {args.max_pairs}: a prompt has one list; allowed without --choose list")
    return args


DESCRIPTION = """\
Make preference pairs, or ranked lists, from scores: images or videos of one prompt are rivals. By default the
best of a prompt against its worst; images with equal bytes count once, and equal scores make no pair. Prints
the number of pairs, and the numbers and reasons of dropped ones. `diffalign train --data.path` reads the
file: parquet in Pick-a-Pic's schema with the images in it, or json lines with paths."""

EXAMPLES = """
diffalign score images/mine --rewards pickscore,aesthetic_v2
diffalign pairs images/mine/scores.jsonl --output pairs.parquet --margin 0.5
diffalign pairs images/mine --rewards pickscore,0.5*aesthetic_v2 --combine wins --output pairs.parquet
diffalign pairs images/mine/scores.jsonl --rewards pickscore --choose top-bottom --top 2 --output p.parquet
diffalign pairs images/mine --rewards ensemble:quality.yaml --choose list --output lists.jsonl
diffalign pairs videos/wan --rewards pickscore --tie 0.1 --ties keep --output pairs.jsonl
"""
