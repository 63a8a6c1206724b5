"""``diffalign evaluate``: base against aligned models on the same prompts and noise."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import (
    count,
    device_name,
    make_parser,
    names,
    number,
    output_folder,
    parse,
    print_json,
    share,
    table,
    tell_of_prompts,
)
from diffalign.cli.distances import (
    add_distance_options,
    distance_lines,
    perceptual_notes,
    perceptual_settings,
)
from diffalign.cli.model_arguments import (
    add_quantize_option,
    add_sampling_options,
    sampling_advice,
    sampling_settings,
    trained_run,
)
from diffalign.errors import UserError
from diffalign.utils.memory import advised
from diffalign.utils.places import folder_to_write
from diffalign.utils.text import read_json_object

if TYPE_CHECKING:
    from diffalign.evaluation.drawing.pipeline import Pipeline
    from diffalign.evaluation.drawing.sampling import SamplingSettings
    from diffalign.evaluation.measuring.store import NamedReward
    from diffalign.evaluation.report.report import RunFacts
    from diffalign.evaluation.running import Entrant


def run(argv: Sequence[str]) -> int:
    """Draws with every model, scores, and writes the report; what is there already is not done again."""
    args = read(argv)
    # first, since a wrong name should cost no model's loading
    rewards = named_rewards(names(args.rewards, "--rewards"), args)
    from diffalign.data.prompts.prompt_sets import read_prompt_set
    from diffalign.evaluation.report.paper import paper_table
    from diffalign.evaluation.report.report import contest_data, write_contest
    from diffalign.evaluation.running import evaluate_models

    prompts = read_prompt_set(args.prompts, args.limit)
    tell_of_prompts(prompts.prompts)
    specs = names(args.runs or args.aligned, "--aligned") if args.run is None else [args.run]
    settings = sampling_settings(args, trained_run(specs, args))
    perceptual = perceptual_settings(args)
    found = compared(args, settings)
    output = folder_to_write(args.output or args.run or "runs/evaluation")
    rank, world = share()
    try:
        with advised("drawing and scoring", sampling_advice(args)):
            contest = evaluate_models(
                found.base,
                found.entrants,
                prompts,
                rewards,
                settings,
                output=output,
                images_per_prompt=args.images_per_prompt,
                seed=args.seed,
                batch_size=args.batch_size,
                rank=rank,
                world=world,
                progress=rank == 0,
                perceptual=perceptual,
            )
    except KeyboardInterrupt:
        print(f"what is drawn and scored is kept in {output}; the same command goes on", file=sys.stderr)
        raise
    if contest is None:  # another process writes
        return 0
    contest = replace(contest, repeats=args.runs is not None)
    page = write_contest(output, contest, found.facts, found.title, metrics=found.metrics)
    data = contest_data(contest, found.facts)
    for note in [*found.notes, *perceptual_notes(contest.leading, args)]:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print_json(data)
    elif args.table:
        print(paper_table(data, args.table))
    else:
        print(summary(data))
    print(
        f"{page} shows the {contest.leading.kind}; report.json, scores.parquet, scores.jsonl are beside it",
        file=sys.stderr,
    )
    return 0


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = make_parser("evaluate", DESCRIPTION, EXAMPLES)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--run", metavar="FOLDER", help="a run directory: its base model against its aligned/")
    what.add_argument(
        "--runs",
        metavar="FOLDER,FOLDER",
        help="run directories of one recipe by several seeds: each, and all together over runs and prompts",
    )
    what.add_argument("--base", metavar="MODEL", help="hub id, diffusers folder, checkpoint, tiny:sdxl")
    what.add_argument(
        "--aligned",
        metavar="MODEL[,MODEL]",
        help="run directory, aligned/ folder, LoRA folder, or anything that --base takes; one or more",
    )
    what.add_argument(
        "--prompts",
        required=True,
        metavar="SET",
        help="parti, drawbench, geneval, hpdv2, geneval2:FILE, tiny:test, or a txt, jsonl, tsv, csv, parquet",
    )
    what.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N prompts only")
    what.add_argument(
        "--rewards", required=True, metavar="A,B", help="the first gives the verdict; see `diffalign rewards`"
    )
    add_distance_options(what)
    what.add_argument(
        "--output",
        type=output_folder,
        metavar="FOLDER",
        help="default: the run directory, or runs/evaluation",
    )
    what.add_argument("--json", action="store_true", help="print report.json")
    what.add_argument("--table", choices=("latex", "markdown", "csv"), help="print a table for a paper")
    add_sampling_options(parser)
    add_quantize_option(parser)
    args = parse(parser, argv)
    if args.runs is not None:
        if args.run is not None or args.base is not None or args.aligned is not None:
            raise UserError("--runs says all models; leave --run, --base and --aligned out")
        if len(names(args.runs, "--runs")) < 2:
            raise UserError(
                f"--runs is {args.runs!r}; allowed: two or more run directories, or --run for one"
            )
        return args
    if args.run is None and (args.base is None or args.aligned is None):
        raise UserError(
            "evaluate needs --run FOLDER, --runs FOLDER,FOLDER, or --base MODEL and --aligned MODEL"
        )
    if args.run is not None and (args.base is not None or args.aligned is not None):
        raise UserError("--run says both models; leave --base and --aligned out")
    return args


def named_rewards(specs: Sequence[str], args: argparse.Namespace) -> "list[NamedReward]":
    """Return the rewards; UserError for one that there is not, or two of a name."""
    from diffalign.rewards.registry import parse as parse_spec
    from diffalign.rewards.registry import with_prompts

    specs = [with_prompts(spec, args.prompts) for spec in specs]
    called = [parse_spec(spec)[0].name for spec in specs]
    twice = [name for name in called if called.count(name) > 1]
    if twice:
        raise UserError(f"--rewards has {twice[0]!r} twice; allowed: each name once in one evaluation")
    from diffalign.evaluation.measuring.store import NamedReward
    from diffalign.rewards import load
    from diffalign.rewards.scoring.cache import reward_key

    def opener(spec: str) -> Callable[[], Any]:
        return lambda: load(spec, device_name(args.device), batch_size=args.batch_size or 8)

    return [
        NamedReward(name, reward_key(spec), opener(spec)) for name, spec in zip(called, specs, strict=True)
    ]


@dataclass(frozen=True)
class Compared:
    """The models, and facts on their runs for the report, by the aligned models' names."""

    base: "Callable[[], Pipeline]"
    entrants: "list[Entrant]"
    facts: "dict[str, RunFacts]"
    metrics: dict[str, Path]
    title: str
    notes: tuple[str, ...] = ()


def compared(args: argparse.Namespace, settings: "SamplingSettings") -> Compared:
    """Return the named models without loading them; UserError for one that does not exist."""
    from diffalign.evaluation.running import Entrant, entrant_names, slug
    from diffalign.runs.load_pipeline import Named, named, open_named, read_run_directory, run_directory_of

    def opener(found: Named) -> "Callable[[], Pipeline]":
        return lambda: open_named(found, device_name(args.device)).pipeline

    def opened(spec: str, base: str | None) -> Named:
        return named(spec, base, args.dtype, args.quantize)

    if args.run is not None:
        run = read_run_directory(args.run)  # first: its error names what --run takes
        specs, whole = [args.run], opened(args.run, None)
        base, models = Named(whole.model), [whole]
        title = f"{run.model.path} aligned with {run.method['type']}"
    elif args.runs is not None:
        specs = names(args.runs, "--runs")
        found = [read_run_directory(spec) for spec in specs]
        models = [opened(spec, None) for spec in specs]
        others = sorted({f"{run.model.path} by {run.method['type']}" for run in found})
        if len(others) > 1:
            raise UserError(f"--runs has {', '.join(others)}; allowed: runs of one model by one method")
        base, title = Named(models[0].model), f"{others[0]}, {len(specs)} training runs"
    else:
        specs = names(args.aligned, "--aligned")
        base, models = opened(args.base, None), [opened(s, args.base) for s in specs]
        title = f"{', '.join(entrant_names(specs))} against {args.base}"
    known = dict(zip(entrant_names(specs), specs, strict=True))
    runs = {name: run_directory_of(spec) for name, spec in known.items()}
    shared = {"sampling": asdict(settings), "prompts": args.prompts}
    shared |= {name: value for name in ("fid", "lpips") if (value := getattr(args, name))}
    if args.quantize:
        shared["quantize"] = args.quantize
    if len(known) > 1:
        shared["models"] = known
    folders = {name: slug(name) if len(known) > 1 else "aligned" for name in known}
    return Compared(
        opener(base),
        [Entrant(n, folders[n], opener(model)) for n, model in zip(known, models, strict=True)],
        {name: facts_of(folder, shared, title) for name, folder in runs.items()},
        {
            n: f / "metrics.jsonl"
            for n, f in runs.items()
            if f is not None and (f / "metrics.jsonl").is_file()
        },
        title,
        tuple(
            f"{name} is an aligned {model.model.path}, and the base is {base.model.path}: the gain holds the "
            "difference of these two models"
            for name, model in zip(known, models, strict=True)
            if model.aligned is not None and model.model.path != base.model.path
        ),
    )


def facts_of(folder: Path | None, shared: Mapping[str, Any], title: str) -> "RunFacts":
    """Return the facts of a run from its directory, if there is one."""
    from diffalign.evaluation.report.report import RunFacts
    from diffalign.runs.load_pipeline import read_run_directory

    if folder is None:
        return RunFacts("unknown", settings=shared, title=title)
    run = read_run_directory(folder)
    file = folder / "summary.json"
    summary = read_json_object(file) if file.is_file() else {}
    return RunFacts(
        method=str(run.method["type"]),
        train_seconds=summary.get("train_seconds"),
        steps=summary.get("steps"),
        settings=asdict(run) | dict(shared),
        title=title,
    )


def summary(data: Mapping[str, Any]) -> str:
    """Return the numbers of a report as tables: of every model, the best first."""
    from diffalign.evaluation.evaluate import MIN_PROMPTS

    models = data["models"]
    order = sorted(models, key=lambda name: -models[name]["gain"])
    lines = [data["headline"]] if len(models) > 1 else []
    lines += [
        f"{name} over {r['runs']} runs: gain {r['gain']:+.4f} [{r['gain_ci95'][0]:+.4f}, "
        f"{r['gain_ci95'][1]:+.4f}], win rate {r['win_rate']:.1%}"
        for name, r in data.get("over_runs", {}).items()
    ]
    for name in order:
        lines += [f"\n{name}"] if len(models) > 1 else []
        lines += _tables(models[name])
    lines.append(count(data["prompts"], "prompt"))
    if data["prompts"] < MIN_PROMPTS:
        lines.append(f"too few prompts to tell: an interval of a gain needs at least {MIN_PROMPTS}")
    for name in order:
        of = f" {name}:" if len(models) > 1 else ""
        lines += [f"warning:{of} {line}" for line in models[name]["alarm"]]
    return "\n".join(lines)


def _tables(model: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            name,
            f"{r['base']:.4f}",
            f"{r['aligned']:.4f}",
            f"{r['gain']:+.4f} [{r['gain_ci95'][0]:+.4f}, {r['gain_ci95'][1]:+.4f}]",
            f"{r['win_rate']:.1%} [{r['win_rate_ci95'][0]:.1%}, {r['win_rate_ci95'][1]:.1%}]",
            f"{r['p_value_adjusted']:.4f}",
        )
        for name, r in model["rewards"].items()
    ]
    moved = [
        (
            name,
            f"{m['base']:.4f}",
            f"{m['aligned']:.4f}",
            f"{m['change']:+.4f} [{m['change_ci95'][0]:+.4f}, {m['change_ci95'][1]:+.4f}]",
        )
        for name, m in model.get("motion", {}).items()
    ]
    return [
        table(rows, ("reward", "base", "aligned", "gain (95 %)", "win rate (95 %)", "adjusted p")),
        *([table(moved, ("motion", "base", "aligned", "change (95 %)"))] if moved else []),
        *distance_lines(model),
    ]


DESCRIPTION = """\
Compare a base model with aligned ones: all sample the same prompts from the same noise, every reward scores
all samples, and the report has gains and win rates with paired 95 % intervals over prompts, tests corrected
for the number of models and rewards (Holm), gains by category, image statistics and the images. For video
models it also has motion: dynamic degree, smoothness, consistency. --fid adds the Frechet Inception
distance to real images, --lpips the distance to the base and the diversity within prompts. The same command
continues a stopped evaluation; under torchrun every process samples and scores its share."""

EXAMPLES = """
diffalign evaluate --run runs/mine --prompts prompts.txt --rewards pickscore,aesthetic_v2
diffalign evaluate --run runs/tiny --prompts tiny:test --limit 99 --rewards judge,taste --guidance 1
diffalign evaluate --run runs/wan --prompts prompts.txt --rewards pickscore --steps 30 --dtype bfloat16
diffalign evaluate --run runs/mine --prompts coco.txt --rewards pickscore --fid coco/val2017 --lpips
diffalign evaluate --runs runs/seed0,runs/seed1,runs/seed2 --prompts parti --rewards pickscore --table latex
diffalign evaluate --base tiny:sdxl --aligned runs/dpo,runs/sft --prompts tiny:test --limit 64 --rewards judge
torchrun --nproc-per-node 4 -m diffalign evaluate --run runs/mine --prompts parti --rewards pickscore,hpsv2_1
"""
