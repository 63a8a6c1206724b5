"""``diffalign generate``: K images or videos for each prompt of a file, resumable, in one or more
processes."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffalign.cli.common import count, make_parser, number, output_folder, parse, share, tell_of_prompts
from diffalign.errors import UserError
from diffalign.utils.memory import advised

if TYPE_CHECKING:
    from diffalign.evaluation.drawing.samples import Sample


def run(argv: Sequence[str]) -> int:
    """Generate the samples that do not exist yet."""
    parser = make_parser("generate", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "model",
        help="a run directory, an aligned/ folder, a LoRA, a pipeline (folder, file or hub id), tiny:sdxl",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model of a LoRA outside of its run directory")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="txt, jsonl, tsv, csv, parquet; parti, drawbench, geneval, hpdv2; or tiny:test",
    )
    parser.add_argument(
        "--source", metavar="IMAGE", help="an image that every prompt edits; else that of its own row, if any"
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N prompts only")
    parser.add_argument(
        "--output", type=output_folder, default="images", metavar="FOLDER", help="default: images"
    )
    parser.add_argument(
        "--lora-scale", metavar="S,S,...", help="strengths of the LoRA, each into OUTPUT/scale-S, and a grid"
    )
    _network_options(parser)
    from diffalign.cli.model_arguments import (
        add_sampling_options,
        open_model,
        sampling_advice,
        sampling_settings,
        trained_run,
    )

    add_sampling_options(parser)
    args = parse(parser, argv)
    _check_negative(args)
    prompts = _prompts(args)
    rank, world = share()
    from diffalign.evaluation.drawing.sampling import generate
    from diffalign.media.files import all_videos
    from diffalign.runs.negative_branch import add_negative_branch
    from diffalign.runs.sweep import read_scales, sweep, write_grid

    run = trained_run([args.model], args)
    scales = None if args.lora_scale is None else read_scales(args.lora_scale)
    with advised("drawing", sampling_advice(args)):
        model = open_model(args.model, args.base, args)
        if args.negative_model:
            add_negative_branch(model, args.model, args.negative_model, args.base, args.negative_merge)

        def draw(folder: Path) -> "list[Sample]":
            return generate(
                model.pipeline,
                prompts,
                sampling_settings(args, run),
                images_per_prompt=args.images_per_prompt,
                seed=args.seed,
                batch_size=args.batch_size,
                folder=folder,
                rank=rank,
                world=world,
                progress=rank == 0,
            )

        output = Path(args.output)
        drawn = {1.0: draw(output)} if scales is None else sweep(model, scales, output, draw)
    samples = [sample for some in drawn.values() for sample in some]
    if scales is not None and world == 1 and not all_videos([sample.source for sample in samples]):
        print(f"the strengths side by side: {write_grid(drawn, output / 'grid.png')}", file=sys.stderr)
    _tell(samples, args.output, rank, world)
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts, with their sources, and say what is unusual in them."""
    from diffalign.data.prompts.prompt_sets import read_prompts

    prompts = read_prompts(args.prompts, args.limit)
    tell_of_prompts(prompts)
    return prompts if args.source is None else about(prompts, Path(args.source).expanduser())


def _tell(samples: "Sequence[Sample]", output: str, rank: int, world: int) -> None:
    """Say what has been drawn, and how it is scored."""
    from diffalign.media.files import all_videos

    of = "" if world == 1 else f" (of this process, {rank + 1} of {world})"
    kind = "video" if all_videos([sample.source for sample in samples]) else "image"
    print(
        f"{count(len(samples), kind)}{of} in {output}; manifest*.jsonl lists prompts and files",
        file=sys.stderr,
    )
    print(f"score them: diffalign score {shlex.quote(output)} --rewards pickscore", file=sys.stderr)


def _network_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how the network is stored, and of a second one for the negative branch of
    guidance.
    """
    from diffalign.cli.model_arguments import add_quantize_option

    add_quantize_option(parser)
    parser.add_argument(
        "--negative-model",
        metavar="MODEL",
        help="a run, LoRA or pipeline trained with data.flip_labels 1, which guidance guides away from "
        "(Diffusion-NPO)",
    )
    parser.add_argument(
        "--negative-merge",
        type=number(float, 0, 1),
        default=0.0,
        metavar="W",
        help="what the model has learnt counts 1 - W times in the negative branch; default 0",
    )


def _check_negative(args: argparse.Namespace) -> None:
    """UserError for a second network whose weights cannot be combined with the model's."""
    if args.quantize and args.negative_model:
        raise UserError(
            f"--quantize {args.quantize} with --negative-model, whose weights are combined with the model's; "
            "allowed: one of the two"
        )


def about(prompts: Sequence[str], source: Path) -> list[str]:
    """Return the prompts as edits of one image; UserError where it cannot be read."""
    from diffalign.media.sourced import SourcedPrompt

    _ = SourcedPrompt("", source).image  # before a model is loaded
    return [SourcedPrompt(str(prompt), source) for prompt in prompts]


DESCRIPTION = """\
Generate images, or with a video model mp4 files, for a prompt file. A sample depends on (seed, prompt,
number) alone, not on batch size or processes. Samples in the output folder are not generated again. Under
torchrun every process generates its share."""

EXAMPLES = """
diffalign generate runs/mine --prompts prompts.txt --images-per-prompt 4 --output images/mine
diffalign generate stabilityai/stable-diffusion-xl-base-1.0 --prompts prompts.txt --dtype bfloat16 --steps 30
diffalign generate tiny:sdxl --prompts tiny:test --limit 64 --steps 20 --guidance 1 --batch-size 64
diffalign generate black-forest-labs/FLUX.1-Kontext-dev --prompts edits.txt --source photo.png
diffalign generate Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts prompts.txt --frames 81 --dtype bfloat16
diffalign generate style.safetensors --base tiny:sd15 --prompts prompts.txt --lora-scale 0,0.5,1
torchrun --nproc-per-node 4 -m diffalign generate runs/mine --prompts prompts.txt
"""
