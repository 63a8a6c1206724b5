"""``diffalign demo``: a first run for newcomers."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffalign.cli.common import make_parser, number, output_folder, parse, print_json, table
from diffalign.config.io import shipped_configs
from diffalign.errors import unknown


def run(argv: Sequence[str]) -> int:
    """Run the demo, once or with several seeds, and print where the results are."""
    parser = make_parser("demo", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--output", type=output_folder, default="runs/demo", metavar="FOLDER", help="default: runs/demo"
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help="a tiny recipe, instead of --family and --method: tiny_sdxl_ipo, ..."
    )
    parser.add_argument("--family", default="sdxl", help="sdxl or sd15; default sdxl")
    parser.add_argument("--method", default="dpo", help="dpo, or sft as the control; default dpo")
    parser.add_argument(
        "--sampled", action="store_true", help="train on pairs that the model draws and the judge ranks"
    )
    parser.add_argument(
        "--flip-labels", action="store_true", help="flip every label: a control, must get worse"
    )
    parser.add_argument(
        "--steps", type=number(int, 1), metavar="N", help="optimizer steps; default: the recipe's"
    )
    parser.add_argument(
        "--prompts", type=number(int, 1), default=512, metavar="N", help="held-out prompts; default 512"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of the training; default 0")
    parser.add_argument(
        "--seeds", type=number(int, 1), default=1, metavar="N", help="repeat with N seeds from --seed on"
    )
    parser.add_argument("--json", action="store_true", help="print report.json (a list of them with --seeds)")
    args = parse(parser, argv)
    recipe = choose_recipe(args)

    from diffalign.runs.demo import DemoOptions, demo

    reports = []
    for seed in range(args.seed, args.seed + args.seeds):
        output = args.output if args.seeds == 1 else str(Path(args.output, f"seed-{seed}"))
        options = DemoOptions(output, recipe, seed, args.steps, args.prompts, args.sampled, args.flip_labels)
        reports.append(demo(options))
    if args.json:
        print_json(reports if args.seeds > 1 else reports[0])
    else:
        print(summary(reports, args))
    return 0


def choose_recipe(args: argparse.Namespace) -> str:
    """Return the tiny recipe of a family and a method.

    Raises:
        UserError: there is none.
    """
    recipes = [name for name in shipped_configs() if name.startswith("tiny_")]
    if args.recipe is not None:
        if args.recipe not in recipes:
            raise unknown("tiny recipe (--recipe)", args.recipe, recipes)
        return str(args.recipe)
    if (families := {name.split("_")[1] for name in recipes}) and args.family not in families:
        raise unknown("family (--family)", args.family, families)
    methods = {name.split("_", 2)[2] for name in recipes if name.split("_")[1] == args.family}
    if args.method not in methods:
        raise unknown(f"method of the {args.family} demo (--method)", args.method, methods)
    return f"tiny_{args.family}_{args.method}"


def summary(reports: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the numbers, the places of the results, and commands to try next."""
    rows = []
    for i, report in enumerate(reports):
        means = [f"{r['base']:.3f} -> {r['aligned']:.3f}" for r in report["rewards"].values()]
        low, high = report["gain_ci95"]
        gain = f"{report['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append((str(args.seed + i), *means, gain, f"{report['win_rate']:.1%}"))
    lines = [table(rows, ("seed", *reports[0]["rewards"], "gain (95 %)", "win rate"))]
    if len(reports) > 1:
        lines.append(
            f"mean gain over {len(reports)} seeds: {statistics.fmean(r['gain'] for r in reports):+.4f}"
        )
    lines += [f"warning: {line}" for r in reports for line in r["alarm"]]
    where = args.output if len(reports) == 1 else f"{args.output}/seed-{args.seed}"
    lines += [
        "",
        "look at:",
        f"  {where}/report.html     images side by side, curves, win rate",
        f"  {where}/aligned/        what plain diffusers loads, with its model card",
        "try next:",
        "  diffalign demo --method sft --output runs/sft                 the control: the winners alone",
        "  diffalign demo --flip-labels --output runs/flipped            flipped labels: must get worse",
        "  diffalign train sdxl_dpo_lora_24gb --data.path pairs.parquet  a real SDXL",
    ]
    return "\n".join(lines)


DESCRIPTION = """\
Align the embedded tiny SDXL end to end with Diffusion-DPO: train on its preference pairs, sample held-out
prompts with the base and the aligned model from the same noise, score the images, and write a report. A few
minutes on two cores; no download."""

EXAMPLES = """
diffalign demo
diffalign demo --seeds 3 --output runs/three
diffalign demo --method sft --output runs/sft
diffalign demo --family sd15 --steps 50 --prompts 64
"""
