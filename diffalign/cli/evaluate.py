"""``diffalign evaluate``: base against aligned on the same prompts and noise."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import device_name, make_parser, names, number, parse, print_json, table
from diffalign.cli.opening import (
    add_sampling_options,
    open_pipeline,
    open_run,
    read_run_directory,
    sampling_advice,
    sampling_settings,
    with_dtype,
)
from diffalign.errors import UserError
from diffalign.out_of_memory import advised

if TYPE_CHECKING:
    from diffalign.evaluation.report import RunFacts
    from diffalign.evaluation.sampling import SamplingSettings


def run(argv: Sequence[str]) -> int:
    """Samples both models, scores, and writes the report."""
    args = read(argv)
    specs = names(args.rewards, "--rewards")
    from diffalign.data.prompts import read_prompts

    prompts = read_prompts(args.prompts, args.limit)
    from diffalign.evaluation.evaluate import compare_pipelines
    from diffalign.evaluation.report import report_data, write_report
    from diffalign.rewards.registry import parse as parse_spec

    rewards = {
        parse_spec(spec)[0].name: spec for spec in specs
    }  # names first: a wrong one costs no model's loading
    settings = sampling_settings(args, None if args.run is None else read_run_directory(args.run))
    with advised("drawing and scoring", sampling_advice(args)):
        base, aligned, facts, output = models(args, settings)
        comparison = compare_pipelines(
            base,
            aligned,
            prompts,
            load_rewards(rewards, device_name(args.device), args.batch_size or 8),
            settings,
            images_per_prompt=args.images_per_prompt,
            seed=args.seed,
            batch_size=args.batch_size,
            folder=output / "images",
        )
    before, after = ([s.source for s in side] for side in (comparison.base, comparison.aligned))
    page = write_report(output, comparison.evaluation, before, after, facts, metrics=output / "metrics.jsonl")
    data = report_data(comparison.evaluation, facts)
    if args.json:
        print_json(data)
    else:
        print(summary(data))
    print(
        f"{page} shows the {comparison.evaluation.kind}; report.json and scores.jsonl are beside it",
        file=sys.stderr,
    )
    return 0


def read(argv: Sequence[str]) -> argparse.Namespace:
    """The parsed command line."""
    parser = make_parser("evaluate", DESCRIPTION, EXAMPLES)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--run", metavar="FOLDER", help="a run directory: its base model against its aligned/")
    what.add_argument("--base", metavar="MODEL", help="hub id, diffusers folder, checkpoint, tiny:sdxl")
    what.add_argument(
        "--aligned", metavar="MODEL", help="aligned/ folder, LoRA folder, or anything that --base takes"
    )
    what.add_argument(
        "--prompts", required=True, metavar="FILE", help="txt, jsonl, tsv, csv, parquet, or tiny:test"
    )
    what.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N prompts only")
    what.add_argument(
        "--rewards", required=True, metavar="A,B", help="the first gives the verdict; see `diffalign rewards`"
    )
    what.add_argument("--output", metavar="FOLDER", help="default: the run directory, or runs/evaluation")
    what.add_argument("--json", action="store_true", help="print report.json")
    add_sampling_options(parser)
    args = parse(parser, argv)
    if args.run is None and (args.base is None or args.aligned is None):
        raise UserError("evaluate needs --run FOLDER, or --base MODEL and --aligned MODEL")
    if args.run is not None and (args.base is not None or args.aligned is not None):
        raise UserError("--run says both models; leave --base and --aligned out")
    return args


def models(args: argparse.Namespace, settings: "SamplingSettings") -> tuple[Any, Any, "RunFacts", Path]:
    """(base, aligned, what the report says about the run, folder of the report)."""
    from diffalign.evaluation.report import RunFacts
    from diffalign.models.loading import load

    sampling = {"sampling": asdict(settings)}
    if args.run is None:
        base = open_pipeline(args.base, None, args)
        aligned = open_pipeline(args.aligned, args.base, args)
        title = f"{args.aligned} against {args.base}"
        return (
            base,
            aligned,
            RunFacts("unknown", settings=sampling, title=title),
            Path(args.output or "runs/evaluation"),
        )
    run, model = open_run(args.run, args)
    base = load(with_dtype(run.model, args.dtype), device_name(args.device)).pipeline
    summary = Path(args.run, "summary.json")
    known: dict[str, Any] = json.loads(summary.read_text()) if summary.is_file() else {}
    facts = RunFacts(
        method=str(run.method["type"]),
        train_seconds=known.get("train_seconds"),
        steps=known.get("steps"),
        settings=asdict(run) | sampling,
        title=f"{run.model.path} aligned with {run.method['type']}",
    )
    return base, model.pipeline, facts, Path(args.output or args.run)


def load_rewards(specs: Mapping[str, str], device: str, batch_size: int) -> dict[str, Any]:
    """Rewards by name."""
    from diffalign.rewards import load

    return {name: load(spec, device, batch_size=batch_size) for name, spec in specs.items()}


def summary(data: Mapping[str, Any]) -> str:
    """The numbers of a report as a table."""
    rows = [
        (
            name,
            f"{r['base']:.4f}",
            f"{r['aligned']:.4f}",
            f"{r['gain']:+.4f} [{r['gain_ci95'][0]:+.4f}, {r['gain_ci95'][1]:+.4f}]",
            f"{r['win_rate']:.1%} [{r['win_rate_ci95'][0]:.1%}, {r['win_rate_ci95'][1]:.1%}]",
        )
        for name, r in data["rewards"].items()
    ]
    moved = [
        (
            name,
            f"{m['base']:.4f}",
            f"{m['aligned']:.4f}",
            f"{m['change']:+.4f} [{m['change_ci95'][0]:+.4f}, {m['change_ci95'][1]:+.4f}]",
        )
        for name, m in data.get("motion", {}).items()
    ]
    lines = [
        table(rows, ("reward", "base", "aligned", "gain (95 %)", "win rate (95 %)")),
        *([table(moved, ("motion", "base", "aligned", "change (95 %)"))] if moved else []),
        f"{data['prompts']} prompts",
    ]
    return "\n".join([*lines, *(f"warning: {line}" for line in data["alarm"])])


DESCRIPTION = """\
Compare a base model with an aligned one: both draw the prompts from the same noise, every reward scores
both, and the report has gains and win rates with paired 95 % intervals over prompts, image statistics and
the images. Of models of videos it has motion beside quality: dynamic degree, smoothness, consistency."""

EXAMPLES = """
diffalign evaluate --run runs/mine --prompts prompts.txt --rewards pickscore,aesthetic_v2
diffalign evaluate --run runs/tiny --prompts tiny:test --limit 99 --rewards judge,taste --guidance 1
diffalign evaluate --run runs/wan --prompts prompts.txt --rewards pickscore --steps 30 --dtype bfloat16
diffalign evaluate --base tiny:sdxl --aligned runs/tiny/aligned --prompts tiny:test --limit 64 --rewards judge
"""
