"""Options that name a pipeline (a model, an ``aligned/`` folder or a run directory) and its sampling
settings."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import device_name, number, share, side
from diffalign.config.schema import Run
from diffalign.errors import UserError
from diffalign.utils.devices import DTYPES

if TYPE_CHECKING:
    from diffalign.evaluation.drawing.sampling import SamplingSettings
    from diffalign.models.loaded import LoadedModel


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``generate`` and ``evaluate`` have in common."""
    drawing = parser.add_argument_group(
        "how images or videos are drawn (what is left out is a run's, or the pipeline's own default)"
    )
    drawing.add_argument("--images-per-prompt", type=number(int, 1), default=1, metavar="K", help="default 1")
    drawing.add_argument("--seed", type=number(int, 0), default=0, help="same seed, same noise; default 0")
    drawing.add_argument("--steps", type=number(int, 1), metavar="N", help="sampling steps")
    drawing.add_argument(
        "--guidance", type=number(float, 0), metavar="G", help="scale of classifier-free guidance"
    )
    drawing.add_argument("--height", type=side, metavar="PX", help="pixels; default: of a run, as trained")
    drawing.add_argument("--width", type=side, metavar="PX", help="pixels; default: of a run, as trained")
    drawing.add_argument("--frames", type=number(int, 1), metavar="N", help="frames of a video")
    drawing.add_argument("--fps", type=number(float, 0.1), metavar="R", help="frames a second of a video")
    drawing.add_argument(
        "--negative-prompt", metavar="TEXT", help="text in place of the empty prompt of guidance"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=number(int, 1), metavar="B", help="at once; default 8 images, or 1 video"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    machine.add_argument("--dtype", default=None, help=f"{', '.join(DTYPES)}; default: the run's, or float32")


def add_quantize_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--quantize``, of commands that change no weight."""
    parser.add_argument(
        "--quantize",
        metavar="KIND",
        help="store the network's linear layers as model.quantize does in training: nf4, int8, torchao_int8, "
        "torchao_float8; default: unquantised",
    )


def sampling_settings(args: argparse.Namespace, run: Run | None = None) -> "SamplingSettings":
    """Return the settings of ``add_sampling_options``; the size and frames of a run's training where none are
    given.
    """
    from diffalign.evaluation.drawing.sampling import SamplingSettings

    given = SamplingSettings(
        args.steps, args.guidance, args.height, args.width, args.negative_prompt, args.frames, args.fps
    )
    if run is None:
        return given
    data, (height, width) = run.data, run.size
    if args.height is None and args.width is None and share()[0] == 0:
        print(
            f"drawn at {width} x {height} px, the size of training; --width and --height set another",
            file=sys.stderr,
        )
    return replace(
        given,
        height=args.height or height,
        width=args.width or width,
        num_frames=args.frames or data.frames,
        fps=args.fps or data.fps,
        max_sequence_length=run.model.max_sequence_length,
    )


def trained_run(specs: Sequence[str], args: argparse.Namespace) -> Run | None:
    """Return the first run among the models, whose size and frames are used for sampling; None if none is a
    run.

    Raises:
        UserError: runs of several sizes, and no --height and --width.
    """
    from diffalign.runs.load_pipeline import read_run_directory, run_directory_of

    folders = {spec: folder for spec in specs if (folder := run_directory_of(spec)) is not None}
    runs = {spec: read_run_directory(folder) for spec, folder in folders.items()}
    sizes = {spec: (run.size, run.data.frames) for spec, run in runs.items()}
    if len(set(sizes.values())) > 1 and (args.height is None or args.width is None):
        each = ", ".join(f"{spec} at {w} x {h}" for spec, ((h, w), _) in sizes.items())
        raise UserError(f"models were trained at several sizes ({each}); give --height and --width")
    for spec, run in runs.items():
        if run.model.quantize != "none" and args.quantize is None and share()[0] == 0:
            print(
                f"{spec}: trained over weights in {run.model.quantize}, opened over whole ones; "
                f"--quantize {run.model.quantize} opens it as in training",
                file=sys.stderr,
            )
    return next(iter(runs.values()), None)


def sampling_advice(args: argparse.Namespace) -> list[str]:
    """Return the options of ``add_sampling_options`` that save memory and are not given."""
    at_once = args.batch_size
    advice = [] if at_once == 1 else [f"--batch-size 1 (now {at_once or '8 images, or 1 video'})"]
    advice.append(f"fewer --frames, if these are videos (now {args.frames or 'the default'})")
    size = f"{args.height} and {args.width}" if args.height and args.width else "the default"
    advice.append(f"a smaller --height and --width (now {size})")
    if args.dtype not in DTYPES[1:]:
        advice.append("--dtype bfloat16")
    return [*advice, "--quantize nf4"] if getattr(args, "quantize", "none") is None else advice


def open_model(spec: str, base: str | None, args: argparse.Namespace) -> "LoadedModel":
    """Load the model that ``spec`` names: a run directory, a LoRA (over ``base``), or a model.

    Raises:
        UserError: nothing of that kind exists, or it needs no other base.
    """
    from diffalign.runs import load_pipeline

    found = load_pipeline.named(spec, base, args.dtype, getattr(args, "quantize", None))
    load_pipeline.check_base(found, spec, base)
    return load_pipeline.open_named(found, device_name(args.device))


def open_pipeline(spec: str, base: str | None, args: argparse.Namespace) -> Any:
    """Return the pipeline of ``open_model``."""
    return open_model(spec, base, args).pipeline
