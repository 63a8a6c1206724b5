"""``diffalign edit``: change what a model assumes of a word, in closed form (TIME), and take it back."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import count, device_name, make_parser, names, number, output_folder, parse, table
from diffalign.cli.model_arguments import add_sampling_options, open_model, sampling_advice, sampling_settings
from diffalign.errors import UserError
from diffalign.utils.memory import advised
from diffalign.utils.places import folder_to_write

if TYPE_CHECKING:
    from diffalign.models.time_edit.edit import EditSettings, Pair
    from diffalign.runs.time_edit import Drawing


def run(argv: Sequence[str]) -> int:
    """Edit, or undo, and write the pipeline."""
    args = parse(_parser(), argv)
    output = _output(args)
    from diffalign.runs.time_edit import edit_model, undo_edits

    if args.undo is not None:
        model = open_model(args.model, args.base, args)
        left = undo_edits(model, args.undo, output)
        print(f"{output}: {count(args.undo, 'edit')} taken back, {left} left", file=sys.stderr)
        return 0
    if (args.height is None) != (args.width is None):
        raise UserError("--height and --width: one is given; allowed: both or none")
    pairs, settings = _pairs(args), _settings(args)
    drawing = None if args.no_report else _drawing(args)
    with advised("editing and drawing", sampling_advice(args)):
        model = open_model(args.model, args.base, args)
        size = (args.height, args.width) if args.height and args.width else None
        say = lambda line: print(line, file=sys.stderr)  # noqa: E731
        outcome = edit_model(model, pairs, settings, output, drawing=drawing, size=size, say=say)
    print(f"{output} is the edited pipeline: DiffusionPipeline.from_pretrained({str(output)!r})")
    if outcome.groups:
        from diffalign.evaluation.report.edit_page import summary

        head, rows = summary(outcome.groups)
        print(table(rows, head))
        print(f"before and after: {output / 'edit.html'}, numbers in edit.json", file=sys.stderr)
    print(f"take it back: diffalign edit {shlex.quote(str(output))} --undo", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("edit", DESCRIPTION, EXAMPLES)
    parser.add_argument("model", help="a pipeline: folder, file or hub id, tiny:sdxl; for --undo its folder")
    parser.add_argument("--base", metavar="MODEL", help="the pipeline that a network alone belongs to")
    parser.add_argument(
        "--output", type=output_folder, metavar="FOLDER", help="default: edited; of --undo: the folder itself"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    what = parser.add_argument_group("the edit")
    what.add_argument(
        "--from",
        dest="sources",
        action="append",
        default=[],
        metavar="PROMPT",
        help="source; may be repeated",
    )
    what.add_argument(
        "--to", dest="destinations", action="append", default=[], metavar="PROMPT",
        help="destination of the --from before it",
    )  # fmt: skip
    what.add_argument(
        "--edits", metavar="FILE",
        help="csv, tsv, json or jsonl with `from` and `to`; equal ones hold a prompt as it is",
    )  # fmt: skip
    what.add_argument(
        "--lambda", dest="strength", type=number(float, 1e-12), default=0.1, metavar="L",
        help="weight of staying where the model is; default 0.1",
    )  # fmt: skip
    what.add_argument("--values-only", action="store_true", help="leave projections to keys as they are")
    what.add_argument(
        "--template", action="append", default=[], metavar="TEXT",
        help="sentence with {} for the prompt, in place of the published four ({}, A photo of {}, ...)",
    )  # fmt: skip
    what.add_argument("--templates", metavar="FILE", help="txt of such sentences, one a line")
    what.add_argument(
        "--undo", nargs="?", const=1, type=number(int, 1), metavar="N", help="take N edits back"
    )
    report = parser.add_argument_group("the page of before and after, edit.html")
    report.add_argument("--no-report", action="store_true", help="draw nothing")
    report.add_argument("--prompts", metavar="FILE", help="prompts to draw, as `generate` takes them")
    report.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N prompts only")
    report.add_argument("--rewards", metavar="A,B", help="rewards of before and after")
    add_sampling_options(parser)
    return parser


def _output(args: argparse.Namespace) -> Path:
    """Return where the pipeline is written.

    Raises:
        UserError: something is there already, or nothing can be written there.
    """
    if args.undo is not None and args.output is None:
        folder = Path(args.model)
        if not (folder / "model_index.json").is_file():
            raise UserError(f"--undo {args.model!r}: no pipeline folder; give the one that was edited")
        return folder_to_write(args.model)
    output = folder_to_write(args.output or "edited")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; replace it with --overwrite, or choose another --output")
    return output


def _pairs(args: argparse.Namespace) -> "list[Pair]":
    from diffalign.models.time_edit.edit import Pair
    from diffalign.runs.time_edit import read_pairs

    if len(args.sources) != len(args.destinations):
        raise UserError(
            f"{len(args.sources)} --from and {len(args.destinations)} --to; allowed: as many of each"
        )
    pairs = [Pair(*both) for both in zip(args.sources, args.destinations, strict=True)]
    pairs += read_pairs(args.edits) if args.edits else []
    if not pairs:
        raise UserError("nothing to edit: give --from and --to, or --edits FILE")
    return pairs


def _settings(args: argparse.Namespace) -> "EditSettings":
    from diffalign.models.time_edit.edit import TEMPLATES, EditSettings
    from diffalign.utils.text import text_lines

    templates = [*args.template]
    if args.templates:
        templates += [line.strip() for _, line in text_lines(args.templates) if line.strip()]
    return EditSettings(args.strength, not args.values_only, tuple(templates) or TEMPLATES)


def _drawing(args: argparse.Namespace) -> "Drawing":
    from diffalign.data.prompts.prompt_sets import read_prompts
    from diffalign.rewards import load
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.runs.time_edit import Drawing

    specs = names(args.rewards, "--rewards") if args.rewards else []
    rewards = {
        parse_spec(spec)[0].name: load(spec, device_name(args.device), batch_size=args.batch_size or 8)
        for spec in specs
    }
    return Drawing(
        tuple(read_prompts(args.prompts, args.limit)) if args.prompts else (),
        sampling_settings(args),
        args.images_per_prompt,
        args.seed,
        args.batch_size,
        rewards,
    )


DESCRIPTION = """\
Change what a text-to-image model assumes of a word, without training (TIME, arXiv 2303.08084): projections
of the text are moved in closed form so that the source prompt becomes what the destination prompt was. Writes
a pipeline that plain diffusers loads, a page of before and after, and what --undo needs."""

EXAMPLES = """
diffalign edit stabilityai/stable-diffusion-xl-base-1.0 --from "a pack of roses" --to "a pack of blue roses"
diffalign edit sd15/ --from "roses" --to "blue roses" --from "a dog" --to "a black dog" --output edited
diffalign edit sd15/ --edits edits.csv --prompts prompts.txt --rewards clipscore --steps 30
diffalign edit tiny:sdxl --from "red circle" --to "blue circle" --prompts tiny:test --limit 64 --steps 20
diffalign edit edited --undo
"""
