"""``diffalign score``: any rewards over images or videos."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from diffalign.cli.common import count, make_parser, names, output_file, parse, print_json, table
from diffalign.cli.scoring import add_scoring_options, beside, scorers_of, show_unreadable
from diffalign.errors import UserError
from diffalign.utils.places import file_to_write


def run(argv: Sequence[str]) -> int:
    """Score images or videos, write a table and print the means."""
    args = parse(_parser(), argv)
    specs = names(args.rewards, "--rewards")
    source = Path(args.source)
    output = Path(args.output) if args.output else _beside(source)

    from diffalign.data.prompts.prompt_sets import read_prompts
    from diffalign.rewards.ensemble import judges_edits
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.rewards.scoring.items import read_items
    from diffalign.rewards.scoring.score import check_table, score, write_table
    from diffalign.rewards.videos import needs_videos

    check_table(output).parent.mkdir(parents=True, exist_ok=True)  # raises before anything is scored
    cards = [parse_spec(spec)[0] for spec in specs]  # checks names before anything is read or loaded
    prompts = read_prompts(args.prompts) if args.prompts else None
    every = islice(read_items(source, prompts, any(map(judges_edits, specs))), args.limit)
    first = list(islice(every, 1))  # checks the source's layout before rewards are loaded
    for card in cards:
        if card.video and first and not first[0].is_video:
            raise needs_videos(card.name)
    items = chain(first, every)
    with scorers_of(args, specs, output.parent / "score-cache.sqlite") as (scorers, cache):
        scores = score(items, scorers, cache)
    write_table(scores.rows, output)
    show_unreadable(scores.unreadable)
    means = summarise(scores.rows)
    if args.json:
        print_json(means)
    else:
        print(
            table(
                [(m["reward"], str(m["images"]), f"{m['mean']:.4f}") for m in means],
                ("reward", "images", "mean"),
            )
        )
    print(f"scores of {count(len(scores.rows), 'row')} in {output}", file=sys.stderr)
    return 0


def _beside(source: Path) -> Path:
    """Return the file of scores beside a source; UserError if it cannot be written."""
    try:
        return file_to_write(str(beside(source, "scores.jsonl")))
    except UserError as error:
        raise UserError(f"{error}; --output FILE writes the scores elsewhere") from error


def _parser() -> ArgumentParser:
    parser = make_parser("score", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source", help="a folder of images or videos, a run directory, a .parquet or a .jsonl file"
    )
    parser.add_argument(
        "--rewards",
        required=True,
        metavar="A,B",
        help="names of `diffalign rewards`, NAME:FILE_OR_FOLDER, ensemble:FILE.yaml",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="for a folder whose images have no NAME.txt beside them: one prompt for all, or one each",
    )
    parser.add_argument(
        "--output",
        type=output_file,
        metavar="FILE",
        help=".jsonl or .parquet; default: scores.jsonl in, or beside, the source",
    )
    add_scoring_options(parser, "score-cache.sqlite beside the output")
    parser.add_argument("--json", action="store_true", help="print the means as JSON")
    return parser


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return number of images and mean by column of scores."""
    columns = list(dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, float)))
    by_column = {name: [row[name] for row in rows if name in row] for name in columns}
    return [
        {"reward": name, "images": len(values), "mean": fmean(values)} for name, values in by_column.items()
    ]


DESCRIPTION = """\
Score images or videos with rewards. A folder has NAME.txt beside each of them, or was made by `diffalign
generate`; a table (.parquet, .jsonl) has `prompt` or `caption`, and `image` or `video`, a list of `images` or
`videos`, `chosen` and `rejected`, or Pick-a-Pic's `jpg_0` and `jpg_1`; for a reward of edits it has `source`,
too, or the file of --prompts has. Of a video (mp4, webm, mov ...) a
reward of images scores 8 frames. Scores of learned rewards are cached, so nothing is scored twice, and an
interrupted command continues where it stopped. `diffalign pairs` makes preference pairs of the scores."""

EXAMPLES = """
diffalign score images/mine --rewards pickscore,aesthetic_v2
diffalign score images/tiny --rewards judge,taste,tiny_clip
diffalign score videos/wan --rewards pickscore,aesthetic_v2
diffalign score pairs.parquet --rewards pickscore:/models/PickScore_v1 --output scores.parquet
diffalign score photos/ --prompts one-per-image.txt --rewards jpeg --json
"""
