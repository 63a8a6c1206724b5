"""``diffalign video-pairs``: two variants of each real clip, to be labelled and trained on."""

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Sequence

from diffalign.cli.common import count, make_parser, number, output_folder, parse, share, side


def run(argv: Sequence[str]) -> int:
    """Make the pairs that do not exist yet."""
    args = parse(_parser(), argv)

    from diffalign.cli.model_arguments import open_model
    from diffalign.preferences.video_takes.clips import read_clips
    from diffalign.preferences.video_takes.make import PairSettings, make_pairs

    clips = read_clips(args.videos, args.limit)
    settings = PairSettings(
        args.height, args.width, args.frames, args.fps, args.eta, args.steps, args.guidance, args.grid,
        args.seed, args.pairs,
    )  # fmt: skip
    rank, world = share()
    model = open_model(args.model, args.base, args)
    made = make_pairs(model, clips, settings, args.output, rank=rank, world=world, progress=rank == 0)
    for problem in made.unreadable:
        print(f"skipped, {problem}", file=sys.stderr)
    of = "" if world == 1 else f" (of this process, {rank + 1} of {world})"
    print(f"{count(made.pairs, 'pair')}{of} in {made.path}", file=sys.stderr)
    if model.codec.video:
        print(
            f"label them: diffalign label-segments {shlex.quote(str(made.path))} --by reward --rewards ...",
            file=sys.stderr,
        )
    return 0


def _parser() -> ArgumentParser:
    parser = make_parser("video-pairs", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "model",
        help="a run directory, an aligned/ folder, a hub id, a diffusers folder, a checkpoint, tiny:wan",
    )
    parser.add_argument("--base", metavar="MODEL", help="base model of a LoRA outside of its run directory")
    parser.add_argument(
        "--videos",
        required=True,
        metavar="PLACE",
        help="a folder of NAME.mp4 with NAME.txt, or a .jsonl file",
    )
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N clips only")
    parser.add_argument(
        "--output", type=output_folder, default="pairs", metavar="FOLDER", help="default: pairs"
    )
    shape = parser.add_argument_group("what a pair looks like")
    shape.add_argument("--height", type=side, required=True, metavar="PX", help="pixels, a multiple of 8")
    shape.add_argument("--width", type=side, required=True, metavar="PX", help="pixels, a multiple of 8")
    shape.add_argument("--frames", type=number(int, 1), metavar="N", help="at most; default: as a clip has")
    shape.add_argument("--fps", type=number(float, 0.1), help="frames a second; default: each clip's own")
    how = parser.add_argument_group("how it is drawn (defaults: DenseDPO's)")
    how.add_argument("--eta", type=_range, default=(0.65, 0.8), metavar="LOW,HIGH", help=ETA)
    how.add_argument(
        "--steps", type=number(int, 1), default=40, metavar="N", help="of the sampler; default 40"
    )
    how.add_argument(
        "--guidance", type=number(float, 0), default=8.0, metavar="G", help="classifier-free; default 8"
    )
    how.add_argument("--grid", choices=("auto", "even", "model"), default="auto", help=GRID)
    how.add_argument("--pairs", type=number(int, 1), default=1, metavar="K", help="of each clip; default 1")
    how.add_argument("--seed", type=number(int, 0), default=0, help="of eta and noise; default 0")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    machine.add_argument(
        "--dtype", default=None, help="float32, bfloat16, float16; default: the run's, or float32"
    )
    return parser


def _range(text: str) -> tuple[float, float]:
    """``0.65,0.8``, or one number for both."""
    try:
        numbers = [float(part) for part in text.split(",")]
        low, high = numbers * 2 if len(numbers) == 1 else numbers
    except ValueError:
        raise ArgumentTypeError(f"{text!r}; allowed: LOW,HIGH or one number") from None
    return low, high


ETA = (
    "how far clips are noised, drawn once a pair; default 0.65,0.8; 1: two independent samples of the caption"
)
GRID = "times of the sampler: even steps as published, or the model's own; auto: the model's at eta 1 only"

DESCRIPTION = """\
Make pairs of videos for DenseDPO (arXiv 2506.03517): a real clip is noised partially with two seeds and
denoised again, which gives two variants of one scene and motion. With --eta 1 they are independent samples of
the clip's caption, as for Diffusion-DPO. For an image model clips are pictures. pairs.jsonl has no labels
yet: `diffalign label-segments` adds them. Pairs in the output folder are not made again. Under torchrun every
process makes its share."""

EXAMPLES = """
diffalign video-pairs Wan-AI/Wan2.1-T2V-1.3B-Diffusers --videos clips/ --height 480 --width 832 --frames 81
torchrun --nproc-per-node 8 -m diffalign video-pairs runs/mine --videos clips.jsonl --height 480 --width 832
diffalign video-pairs tiny:wan --videos clips/ --height 32 --width 32 --eta 1 --guidance 3 --output vanilla
"""
