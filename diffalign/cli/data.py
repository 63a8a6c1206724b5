"""``diffalign data``: layout and contents of a preference set, before training."""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from diffalign.cli.common import (
    add_reading_options,
    make_parser,
    names,
    number,
    output_file,
    parse,
    print_json,
    reading_of,
    table,
)
from diffalign.errors import UserError

NO_LIMIT = 10**6
"""A tokenizer with a larger limit than this has none."""


def run(argv: Sequence[str]) -> int:
    """Read the set and print its contents."""
    args = parse(_parser(), argv)
    if args.schemas:
        print(_schemas())
        return 0
    if not args.path:
        raise UserError(
            "diffalign data: no set; give a path, a hub name, or --schemas for the list of layouts"
        )

    from tqdm import tqdm

    from diffalign.config.schema import DataConfig
    from diffalign.data.prompts.prompt_sets import read_prompts
    from diffalign.data.reading.presence import check_files
    from diffalign.data.reading.readers import read_preferences
    from diffalign.data.reading.sheet import as_page, as_text
    from diffalign.data.reading.summary import summarise
    from diffalign.utils.files import write_atomic

    config = DataConfig(
        path=args.path, config=args.config, view=args.view, limit=args.limit, **reading_of(args)
    )
    preferences = read_preferences(config)
    check_files(preferences, config)  # each bad file is named in the summary
    evaluation = (
        {name: read_prompts(name) for name in names(args.evaluation, "--evaluation")}
        if args.evaluation
        else {}
    )
    tokenizers = _tokenizers(args.model) if args.model else {}
    bar = lambda rows: iter(tqdm(rows, total=preferences.total, unit="row", disable=args.json))  # noqa: E731
    summary = summarise(preferences, tokenizers, evaluation, args.videos, args.rows, bar)
    text = as_text(summary)
    if args.page:
        write_atomic(Path(args.page), as_page(summary, text, args.videos))
    if args.json:
        print_json(summary.as_json())
    else:
        print(text)
    if args.page:
        print(f"the first {len(summary.shown)} groups are in {args.page}", file=sys.stderr)
    if not summary.prompts[0]:
        raise UserError(f"{args.path} has no row that can be read; {summary.counts.text}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("data", DESCRIPTION, EXAMPLES)
    parser.add_argument("path", nargs="?", help="anything that `train --data.path` reads")
    parser.add_argument(
        "--schemas", action="store_true", help="list the layouts that are recognised, and stop"
    )
    add_reading_options(parser)
    parser.add_argument("--config", metavar="NAME", help="configuration of a hub dataset")
    parser.add_argument(
        "--view",
        default="auto",
        choices=("auto", "demonstrations"),
        help="demonstrations: captioned images are enough; default auto",
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N rows only")
    parser.add_argument(
        "--model", metavar="MODEL", help="folder, hub id or tiny:sdxl: prompts are counted by its tokenizers"
    )
    parser.add_argument(
        "--evaluation",
        metavar="A,B",
        help="prompt sets to compare with: parti, hpdv2, a file, tiny:test, ...",
    )
    parser.add_argument(
        "--page",
        type=output_file,
        metavar="FILE",
        help="write the first rows as pictures into this HTML file",
    )
    parser.add_argument(
        "--rows", type=number(int, 0), default=10, metavar="N", help="of the page; default 10"
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    return parser


def _schemas() -> str:
    from diffalign.data.reading.schemas import SCHEMAS

    rows = []
    for schema in SCHEMAS:
        labels = list(dict.fromkeys(name for label in schema.labels.values() for name in label.columns))
        needed = ", ".join(dict.fromkeys([*schema.files.columns, *schema.needs, *labels]))
        rows.append((schema.name, " or ".join(schema.prompt[:2]), needed))
    return table(rows, ("layout", "prompt", "columns"))


def _tokenizers(model: str) -> Mapping[str, tuple[Callable[[str], int], int | None]]:
    """Return the tokenizers of a pipeline by their component: (tokens of a text, limit).

    Raises:
        UserError: there is none.
    """
    found = _pipeline_tokenizers(model)
    if not found:
        raise UserError(
            f"--model {model!r}: no tokenizer there; allowed: a diffusers folder, a hub id, tiny:sdxl"
        )
    return {name: (_length(one), _limit(one)) for name, one in found.items()}


def _pipeline_tokenizers(model: str) -> dict[str, object]:
    components = ("tokenizer", "tokenizer_2", "tokenizer_3")
    if model.startswith("tiny:"):
        from diffalign.config.schema import ModelConfig
        from diffalign.models.loading import load

        pipeline = load(ModelConfig(path=model), "cpu").pipeline
        return {
            name: getattr(pipeline, name) for name in components if getattr(pipeline, name, None) is not None
        }

    from transformers import AutoTokenizer

    found = {}
    for name in components:
        try:
            found[name] = AutoTokenizer.from_pretrained(model, subfolder=name)
        except (OSError, ValueError, KeyError):  # a pipeline has one to three of them
            continue
    return found


def _length(tokenizer: object) -> Callable[[str], int]:
    encode: Callable[[str], Collection[int]] = tokenizer.encode  # type: ignore[attr-defined]
    return lambda text: len(encode(text))


def _limit(tokenizer: object) -> int | None:
    limit = int(getattr(tokenizer, "model_max_length", NO_LIMIT + 1))
    return limit if limit <= NO_LIMIT else None


DESCRIPTION = """\
Show the layout and contents of a preference set: pairs, ties and rows without label, unreadable, identical
and unused images, sizes and shapes, balance and margins of labels, lengths of prompts and a tokenizer's
limit, duplicates, and prompts shared with an evaluation set. Nothing is encoded or trained."""

EXAMPLES = """
diffalign data tiny:pairs
diffalign data pairs.parquet --model stabilityai/sdxl-base --page pairs.html
diffalign data Rapidata/700k_Human_Preference_Dataset_FLUX_SD3_MJ_DALLE3 --split train_0001 --limit 500
diffalign data mine.jsonl --columns prompt=text,chosen=best,rejected=worst --root images
diffalign data hpdv3/train.json --evaluation parti,hpdv2 --json
"""
