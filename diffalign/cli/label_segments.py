"""``diffalign label-segments``: preferences second by second, for DenseDPO."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import device_name, make_parser, names, number, output_file, parse
from diffalign.errors import UserError
from diffalign.utils.places import file_to_write

if TYPE_CHECKING:
    from diffalign.preferences.segments.by_model import ByModel
    from diffalign.preferences.segments.label import Labeller
    from diffalign.preferences.segments.pairs import Pair
    from diffalign.utils.chat_completions import Answers


def run(argv: Sequence[str]) -> int:
    """Label pairs and write them."""
    args = parse(_parser(), argv)
    from diffalign.preferences.segments.label import label_pairs
    from diffalign.preferences.segments.pairs import read_pairs

    pairs = read_pairs(args.pairs)
    target = file_to_write(args.output or str(Path(args.pairs).with_name("labelled.jsonl")))
    labeller, note = _labeller(args, pairs, target)
    try:
        labelled = label_pairs(
            pairs[: args.limit], labeller, args.pairs, target,
            seconds=args.seconds, min_decided=args.min_decided, note=note,
            workers=args.workers if args.by == "vlm" else 1,
        )  # fmt: skip
    finally:
        if note is not None:
            print(note(), file=sys.stderr)
    for problem in labelled.unreadable:
        print(f"skipped, {problem}", file=sys.stderr)
    print(f"{labelled.text}; written to {target}", file=sys.stderr)
    path = shlex.quote(str(target))
    print(f"train on them: diffalign train ... --method.type densedpo --data.path {path}", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("label-segments", DESCRIPTION, EXAMPLES)
    parser.add_argument("pairs", help="json lines of prompt and videos, such as pairs.jsonl of video-pairs")
    parser.add_argument("--by", required=True, choices=("file", "reward", "vlm"), help="who labels")
    parser.add_argument(
        "--output", type=output_file, metavar="FILE", help="default: labelled.jsonl beside the pairs"
    )
    parser.add_argument(
        "--seconds", type=number(float, 0.01), default=1.0, metavar="S", help="of a segment; default 1"
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N pairs only")
    parser.add_argument(
        "--min-decided", type=number(float, 0, 1), default=0.0, metavar="SHARE",
        help="leave out pairs unless more of their segments have a winner; default 0, DenseDPO 0.2",
    )  # fmt: skip
    parser.add_argument(
        "--answers",
        type=output_file,
        metavar="FILE",
        help="keeps what was scored or answered; default: beside the output",
    )
    people = parser.add_argument_group("--by file")
    people.add_argument(
        "--labels", metavar="FILE", help="csv or jsonl: pair (or video_0, video_1), segment, label"
    )
    reward = parser.add_argument_group("--by reward")
    reward.add_argument("--rewards", metavar="A,B", help="of `diffalign rewards`; several vote")
    reward.add_argument(
        "--margin", type=number(float, 0), default=0.0, help="scores this near are a tie; default 0"
    )
    reward.add_argument("--batch-size", type=number(int, 1), default=16, metavar="B", help="default 16")
    reward.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    reward.add_argument("--dtype", default="float32", help="float32, bfloat16, float16; default float32")
    model = parser.add_argument_group(
        "--by vlm: a vision-language model behind an OpenAI-compatible endpoint"
    )
    model.add_argument("--url", default="http://localhost:8000/v1", help="default http://localhost:8000/v1")
    model.add_argument("--model", default="", metavar="NAME", help="its name there")
    model.add_argument(
        "--key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="that holds the key; default OPENAI_API_KEY",
    )
    model.add_argument("--fps", type=number(float, 0.1), default=8.0, help="frames it is shown; default 8")
    model.add_argument(
        "--side", type=number(int, 16), default=512, metavar="PX", help="of a frame, at most; default 512"
    )
    model.add_argument(
        "--question", metavar="FILE", help="a text of your own; {prompt} is the videos' prompt"
    )
    model.add_argument("--workers", type=number(int, 1), default=4, metavar="N", help="at once; default 4")
    model.add_argument("--timeout", type=number(float, 0.1), default=120.0, help="seconds; default 120")
    model.add_argument("--retries", type=number(int, 0), default=5, help="further tries; default 5")
    model.add_argument("--price-in", type=number(float, 0), default=0.0, help="of a million tokens read")
    model.add_argument("--price-out", type=number(float, 0), default=0.0, help="of a million tokens written")
    return parser


def _labeller(
    args: argparse.Namespace, pairs: "Sequence[Pair]", target: Path
) -> "tuple[Labeller, Callable[[], str] | None]":
    """Return the labeller, and a function for a line on its cost."""
    if args.by == "file":
        from diffalign.preferences.segments.by_file import ByFile

        if not args.labels:
            raise UserError("--by file needs --labels FILE: a .csv or .jsonl of people's labels")
        return ByFile(args.labels, pairs), None
    from diffalign.utils.chat_completions import Answers

    answers = Answers(args.answers or target.with_suffix(f".{args.by}-answers.jsonl"))
    if args.by == "vlm":
        by_model = _model(args, answers)
        return by_model, lambda: by_model.usage.text(by_model.settings)
    from diffalign.preferences.segments.by_reward import ByReward
    from diffalign.rewards import load
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.rewards.scoring.cache import reward_key

    if not args.rewards:
        raise UserError("--by reward needs --rewards NAME: see `diffalign rewards`")
    device = device_name(args.device)
    rewards = {
        spec: load(spec, device, args.dtype, args.batch_size) for spec in names(args.rewards, "--rewards")
    }
    identity = {spec: reward_key(spec) for spec in rewards if parse_spec(spec)[0].cached}
    return ByReward(rewards, args.margin, args.seconds, answers, identity), None


def _model(args: argparse.Namespace, answers: "Answers") -> "ByModel":
    from diffalign.preferences.segments.by_model import QUESTION, ByModel, QuestionSettings
    from diffalign.utils.chat_completions import Endpoint, check_endpoint
    from diffalign.utils.http import Patience

    check_endpoint(args.url, args.model, "--", "--by vlm")
    if args.question and not Path(args.question).is_file():
        raise UserError(f"--question {args.question!r}: no such file; allowed: a text file")
    question = Path(args.question).read_text(encoding="utf-8") if args.question else QUESTION
    settings = QuestionSettings(args.seconds, args.fps, args.side, question, args.price_in, args.price_out)
    endpoint = Endpoint(args.url, args.model, args.key, Patience(args.timeout, args.retries))
    return ByModel(endpoint, answers, settings)


DESCRIPTION = """\
Label which of two videos is better in each second: from people's labels, by rewards, or by a vision-language
model that compares them in both orders (contradictions are ties). The result has segments for DenseDPO and,
as scores, their majority for methods that need one label a pair. Scores and answers are saved: an interrupted
command continues, and nothing is paid for twice."""

EXAMPLES = """
diffalign label-segments pairs/pairs.jsonl --by reward --rewards pickscore --margin 0.2
diffalign label-segments pairs/pairs.jsonl --by file --labels people.csv
diffalign label-segments pairs/pairs.jsonl --by vlm --url http://localhost:8000/v1 --model Qwen2.5-VL-72B
diffalign label-segments pairs.jsonl --by vlm --url https://api.openai.com/v1 --model o3 --price-in 2
"""
