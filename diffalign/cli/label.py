"""``diffalign label``: a page on which people compare images or videos."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import (
    add_reading_options,
    device_name,
    make_parser,
    names,
    number,
    output_folder,
    parse,
    reading_of,
)
from diffalign.errors import UserError
from diffalign.utils.places import folder_to_write
from diffalign.utils.text import user_path

if TYPE_CHECKING:
    from diffalign.preferences.labelling.tasks import Task


def run(argv: Sequence[str]) -> int:
    """Serve the page until it is interrupted, then print a summary of the answers."""
    args = parse(_parser(), argv)
    if args.order == "disagreement" and not args.rewards:
        raise UserError(
            "--order disagreement needs --rewards; allowed: two rewards or more, such as pickscore,hpsv2_1"
        )
    if args.rewards and args.order != "disagreement":
        raise UserError(
            f"--rewards {args.rewards!r} with --order {args.order}; allowed: --order disagreement"
        )

    from diffalign.preferences.labelling.results import evaluation_tasks, is_evaluation, summary
    from diffalign.preferences.labelling.server import Session, serve
    from diffalign.preferences.labelling.store import (
        LOCK,
        AnswerStore,
        write_blind,
        write_labels,
        write_round,
    )
    from diffalign.preferences.labelling.tasks import in_order, is_round, read_tasks, write_index
    from diffalign.utils.lock import locked

    source = user_path(args.source)
    of_round, blind = is_round(source), is_evaluation(source)
    settings = reading_of(args)
    _check(args, of_round, blind, settings)
    if blind:
        tasks = evaluation_tasks(source, args.aligned, args.limit)
        output = source / "people" / tasks[0].models[1]
    else:
        own = f"{args.source.replace(':', '-').rstrip('/')}-labels"
        output = source if of_round else folder_to_write(args.output or own)
        tasks = read_tasks(args.source, output, args.limit, settings)
    divided = (
        _disagreement(names(args.rewards, "--rewards"), device_name(args.device)) if args.rewards else None
    )
    tasks = in_order(tasks, args.order, args.seed, divided)
    with locked(output, LOCK):
        write = write_round if of_round else write_blind if blind else write_labels
        store = AnswerStore(tasks, output, write)
        if store.dropped:
            print(f"note: {output}/answers.jsonl ended in half a line, which is dropped", file=sys.stderr)
        write_index(tasks, output / "tasks.jsonl")
        session = Session(store, f"diffalign: {args.source}", args.votes)
        serve(session, args.host, args.port, _say_address)
        print(summary(session, output, of_round, source if blind else None), file=sys.stderr)
    return 0


def _parser() -> ArgumentParser:
    parser = make_parser("label", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "source",
        help="a folder of `diffalign generate`, a preference set, runs/NAME/rollouts/round-0000, or of "
        "`diffalign evaluate` (blind: base against aligned)",
    )
    parser.add_argument(
        "--output",
        type=output_folder,
        metavar="FOLDER",
        help="of the answers; default: SOURCE-labels; of a round and an evaluation their own",
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N comparisons only")
    parser.add_argument(
        "--votes", type=number(int, 1), default=1, metavar="K", help="people a comparison; default 1"
    )
    parser.add_argument(
        "--order",
        choices=("random", "given", "disagreement"),
        default="random",
        help="disagreement: where --rewards are most divided comes first; default random",
    )
    parser.add_argument("--rewards", metavar="A,B", help="for --order disagreement")
    parser.add_argument("--aligned", metavar="NAME", help="of an evaluation of several models: which one")
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of --order random; default 0")
    parser.add_argument(
        "--host", default="127.0.0.1", help="default 127.0.0.1, this machine alone; others need a token"
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8764, help="0 picks a free one; default 8764"
    )
    parser.add_argument("--device", default="auto", help="of --rewards: auto, cpu, cuda; default auto")
    add_reading_options(parser.add_argument_group("how a preference set is read, as by `diffalign data`"))
    return parser


def _check(args: Namespace, of_round: bool, blind: bool, settings: Mapping[str, Any]) -> None:
    """Refuse options that would do nothing with this source."""
    if args.output and (of_round or blind):
        what, reader = ("a round", "run") if of_round else ("an evaluation", "report")
        raise UserError(
            f"--output {args.output!r} with {what}; allowed: none, since the {reader} reads the answers there"
        )
    if args.aligned is not None and not blind:
        raise UserError(
            f"--aligned {args.aligned!r}, but {args.source!r} is no folder of `diffalign evaluate`"
        )
    if blind and settings:
        raise UserError(
            f"{args.source!r} is an evaluation, with {', '.join(settings)}; allowed: with a preference set"
        )


def _say_address(address: str) -> None:
    print("Ctrl-C stops it; every answer is saved at once", file=sys.stderr, flush=True)
    print(address, flush=True)


def _disagreement(specs: Sequence[str], device: str) -> "Callable[[Task], float]":
    from diffalign.preferences.labelling.results import disagreement_of

    if len(specs) < 2:
        raise UserError(f"--rewards {','.join(specs)!r}; allowed with --order disagreement: two or more")
    return disagreement_of(specs, device)


DESCRIPTION = """\
Open a page on which people compare images or videos of a prompt, by keyboard: left and right (or 1 to 9),
down for no difference, S to skip, Z to undo. Answers are appended to answers.jsonl at once, so nothing is
lost when the command is killed; `diffalign train --data.path` reads labels.jsonl beside it. Several people
enter their names and share the work; with --votes 2 each comparison is answered twice, and the agreement is
printed."""

EXAMPLES = """
diffalign generate sdxl --prompts prompts.txt --images-per-prompt 2 --output images
diffalign label images
diffalign train sdxl_dpo_lora_24gb --data.path images-labels/labels.jsonl
diffalign label pairs.parquet --order disagreement --rewards pickscore,hpsv2_1 --limit 500
diffalign label runs/people/rollouts/round-0000
diffalign label runs/mine/evaluation --host 0.0.0.0 --votes 3
"""
