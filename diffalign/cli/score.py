"""``diffalign score``: any rewards over images or videos."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from diffalign.cli.common import device_name, make_parser, names, number, parse, print_json, table


def run(argv: Sequence[str]) -> int:
    """Scores images or videos, writes a table and prints the means."""
    args = parse(_parser(), argv)
    specs = names(args.rewards, "--rewards")
    source = Path(args.source)
    output = (
        Path(args.output) if args.output else (source if source.is_dir() else source.parent) / "scores.jsonl"
    )

    from diffalign.data.prompts import read_prompts
    from diffalign.rewards.cache import ScoreCache
    from diffalign.rewards.items import read_items
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.rewards.score import make_scorers, score, write_table

    for spec in specs:
        parse_spec(spec)  # a wrong name costs neither reading nor loading
    prompts = read_prompts(args.prompts) if args.prompts else None
    items = list(read_items(source, prompts))
    scorers = make_scorers(specs, device_name(args.device), args.dtype, args.batch_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    cached = any(scorer.key is not None for scorer in scorers)
    cache = ScoreCache(args.cache or output.parent / "score-cache.sqlite") if cached else None
    scores = score(items, scorers, cache)
    write_table(scores.rows, output)
    for place in scores.unreadable:
        print(f"skipped, unreadable: {place}", file=sys.stderr)
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
    print(f"{len(scores.rows)} rows are in {output}", file=sys.stderr)
    return 0


def _parser() -> ArgumentParser:
    parser = make_parser("score", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source", help="a folder of images or videos, a run directory, a .parquet or a .jsonl file"
    )
    parser.add_argument(
        "--rewards", required=True, metavar="A,B", help="names of `diffalign rewards`, or NAME:FILE_OR_FOLDER"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="for a folder whose images have no NAME.txt beside them"
    )
    parser.add_argument(
        "--output", metavar="FILE", help=".jsonl or .parquet; default: scores.jsonl in, or beside, the source"
    )
    parser.add_argument(
        "--cache", metavar="FILE", help="scores that are known; default: score-cache.sqlite beside the output"
    )
    parser.add_argument(
        "--batch-size", type=number(int, 1), default=16, metavar="B", help="images at once; default 16"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, float16; default float32")
    parser.add_argument("--json", action="store_true", help="print the means as JSON")
    return parser


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Number of images and mean by column of scores."""
    columns = list(dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, float)))
    by_column = {name: [row[name] for row in rows if name in row] for name in columns}
    return [
        {"reward": name, "images": len(values), "mean": fmean(values)} for name, values in by_column.items()
    ]


DESCRIPTION = """\
Score images or videos with rewards. A folder has NAME.txt beside each of them, or was made by `diffalign
generate`; a parquet file has Pick-a-Pic's columns; a jsonl file has `prompt` and `image` or `video`, a list
of `images` or `videos`, or `chosen` and `rejected`. Of a video (mp4, webm, mov ...) a reward of images scores
8 frames. Scores of learned rewards are kept, so nothing is scored twice."""

EXAMPLES = """
diffalign score images/mine --rewards pickscore,aesthetic_v2
diffalign score images/tiny --rewards judge,taste,tiny_clip
diffalign score videos/wan --rewards pickscore,aesthetic_v2
diffalign score pairs.parquet --rewards pickscore:/models/PickScore_v1 --output scores.parquet
diffalign score photos/ --prompts one-per-image.txt --rewards jpeg --json
"""
