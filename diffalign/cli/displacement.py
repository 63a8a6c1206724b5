"""``diffalign displacement``: pairs that are likely to lower their winner's likelihood in training."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import count, make_parser, number, print_json
from diffalign.cli.flags import read_flags, resolve
from diffalign.errors import UserError
from diffalign.utils.places import folder_to_write

if TYPE_CHECKING:
    from diffalign.config.schema import Run
    from diffalign.evaluation.displacement import PairRow


def run(argv: Sequence[str]) -> int:
    """Measure every pair of a config's preference set; write the report and the list for the filter."""
    parser = make_parser("displacement", DESCRIPTION, EXAMPLES)
    parser.usage = "diffalign displacement CONFIG|RUN [--a.b VALUE ...] [options]"
    parser.add_argument("--draws", type=number(int, 1), default=4, metavar="N", help="of time and noise")
    parser.add_argument("--by", choices=("overlap", "ches"), default="overlap", help="default overlap")
    parser.add_argument("--above", type=number(float, -1e30), metavar="X", help="leave out pairs above X")
    parser.add_argument("--share", type=number(float, 0, 1), metavar="S", help="leave out the highest share")
    parser.add_argument(
        "--show", type=number(int, 0), default=20, metavar="N", help="rows printed; default 20"
    )
    parser.add_argument("--json", action="store_true", help="print displacement.json")
    args, rest = parser.parse_known_args(argv)
    if args.share is not None and args.above is not None:
        raise UserError(f"--share {args.share} and --above {args.above}; allowed: one of them")
    if args.share == 1:
        raise UserError("--share 1.0 leaves out every pair; allowed: less than 1")
    if args.by == "ches" and args.above is None and args.share is None:
        raise UserError("--by ches has no natural limit: give --share (0.1 leaves out a tenth) or --above")
    if not rest:
        raise UserError("displacement needs a config or a run directory, such as tiny_sdxl_dpo or runs/mine")
    config = Path(rest[0], "config.yaml")  # of a run: its folder is a value of flags, too
    first = str(config) if config.is_file() else rest[0]
    run, notes = resolve(read_flags([first, *rest[1:]]), needs=("model.path", "data.path"))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)

    from diffalign.evaluation.displacement import report

    output = folder_to_write(run.output)
    found = report(measured(run, args.draws), args.by, args.above, args.share)
    path, names = found.write(output)
    if args.json:
        import json

        print_json(json.loads(path.read_text(encoding="utf-8")))
    else:
        print(found.text(args.show))
    print(f"{path} has all pairs; train without the left-out ones: --data.drop {names}", file=sys.stderr)
    return 0


def measured(run: "Run", draws: int) -> "list[PairRow]":
    """Return the rows of every pair of the run's preference set, measured with its starting model."""
    from diffalign.data import fixed_batches, read_preferences
    from diffalign.evaluation.displacement import PairRow, measure
    from diffalign.methods import REGISTRY, build
    from diffalign.models.loading import load
    from diffalign.runs.setup import encode
    from diffalign.training.acceleration import accelerator_for

    if run.rollout.prompts or REGISTRY[run.method["type"]].rollout != "samples":
        raise UserError(
            "displacement is measured on a set of pairs, and this run, with method "
            f"{run.method['type']}, learns from rollouts; allowed: data.path without rollout.prompts"
        )
    method = build(run.method)
    accelerator = accelerator_for(run.training)
    model = load(run.model, accelerator.device)
    encoded = encode(run, model, read_preferences(run.data, run.training.seed), accelerator)
    size, seed = run.training.batch_size, run.training.seed
    # One set of a bucket a time, so that rows can be named: batches keep the order of their records.
    rows, buckets = [], sorted({record.bucket for record in encoded})
    for bucket in buckets:
        part = encoded.subset(i for i, record in enumerate(encoded) if record.bucket == bucket)
        batches = (b.to(accelerator.device) for b in fixed_batches(part, model.family, run.data, size, seed))
        time = method.time  # type: ignore[attr-defined]
        for index, found in enumerate(measure(model.denoiser(), model.network, batches, time, draws, seed)):
            numbers = zip(found.inner.tolist(), found.own.tolist(), found.ches.tolist(), strict=True)
            for group, values in zip(found.groups.tolist(), numbers, strict=True):
                record = part[index * size + group]
                rows.append(PairRow(record.where, record.prompt, *values))
    if not rows:
        raise UserError(
            f"data.path {run.data.path!r} has no pairs to measure: {encoded.counts.text}; allowed: groups of "
            "two or more with a winner"
        )
    if left := len(encoded) - len(rows):
        print(f"note: {count(left, 'group')} without winner and loser not measured", file=sys.stderr)
    return rows


DESCRIPTION = """\
Find pairs that are likely to lower their winner's likelihood in training (likelihood displacement). Measures
each pair of a config's preference set with the model that training starts from: `overlap`, the inner product
of winner's and loser's gradients over the winner's squared norm (above 1 one step raises the winner's error),
and CHES, the similarity of the two in the network's hidden states. Writes <output>/displacement.json and
<output>/dropped.txt, the rows to leave out: `--data.drop FILE` trains without them. Takes all flags of
`train`."""

EXAMPLES = """
diffalign displacement tiny_sdxl_dpo --data.limit 256 --output runs/tiny
diffalign displacement sdxl_dpo_lora --data.path pairs.parquet --share 0.1
diffalign displacement runs/mine --by ches --share 0.05
diffalign train sdxl_dpo_lora --data.path pairs.parquet --data.drop runs/mine/dropped.txt
"""
