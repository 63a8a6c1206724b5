"""Pipelines as people name them on the command line: a model, an ``aligned/`` folder, or a run directory."""

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import device_name, number
from diffalign.config.schema import Run
from diffalign.utils.devices import DTYPES

if TYPE_CHECKING:
    from diffalign.evaluation.drawing.sampling import SamplingSettings
    from diffalign.models.loaded import LoadedModel


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that ``generate`` and ``evaluate`` have in common."""
    drawing = parser.add_argument_group(
        "how images or videos are drawn (what is left out is the pipeline's own default, or a video run's)"
    )
    drawing.add_argument("--images-per-prompt", type=number(int, 1), default=1, metavar="K", help="default 1")
    drawing.add_argument("--seed", type=number(int, 0), default=0, help="same seed, same noise; default 0")
    drawing.add_argument("--steps", type=number(int, 1), metavar="N", help="sampling steps")
    drawing.add_argument(
        "--guidance", type=number(float, 0), metavar="G", help="scale of classifier-free guidance"
    )
    drawing.add_argument("--height", type=number(int, 8), metavar="PX")
    drawing.add_argument("--width", type=number(int, 8), metavar="PX")
    drawing.add_argument("--frames", type=number(int, 1), metavar="N", help="of a video")
    drawing.add_argument("--fps", type=number(float, 0.1), metavar="R", help="frames a second of a video")
    drawing.add_argument("--negative-prompt", metavar="TEXT")
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch-size", type=number(int, 1), metavar="B", help="at once; default 8 images, or 1 video"
    )
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...; default auto")
    machine.add_argument("--dtype", default=None, help=f"{', '.join(DTYPES)}; default: the run's, or float32")


def sampling_settings(args: argparse.Namespace, run: Run | None = None) -> "SamplingSettings":
    """What ``add_sampling_options`` has read; of a run of videos the rest is as it was trained."""
    from diffalign.evaluation.drawing.sampling import SamplingSettings

    given = SamplingSettings(
        args.steps, args.guidance, args.height, args.width, args.negative_prompt, args.frames, args.fps
    )
    if run is None:
        return given
    data, given = run.data, replace(given, max_sequence_length=run.model.max_sequence_length)
    if data.frames is None:
        return given
    return replace(
        given,
        height=args.height or data.height or data.resolution,
        width=args.width or data.width or data.resolution,
        num_frames=args.frames or data.frames,
        fps=args.fps or data.fps,
    )


def sampling_advice(args: argparse.Namespace) -> list[str]:
    """What ``add_sampling_options`` offers against a lack of memory and has not been given."""
    at_once = args.batch_size
    advice = [] if at_once == 1 else [f"--batch-size 1 (now {at_once or '8 images, or 1 video'})"]
    advice.append(f"fewer --frames, if these are videos (now {args.frames or 'the default'})")
    size = f"{args.height} and {args.width}" if args.height and args.width else "the default"
    advice.append(f"a smaller --height and --width (now {size})")
    return advice if args.dtype in DTYPES[1:] else [*advice, "--dtype bfloat16"]


def open_model(spec: str, base: str | None, args: argparse.Namespace) -> "LoadedModel":
    """The model that ``spec`` names: a run directory, a folder with a LoRA (over ``base``), or a model.

    Raises:
        UserError: nothing of that kind is there.
    """
    from diffalign.runs import load_pipeline

    return load_pipeline.open_model(spec, base, device_name(args.device), args.dtype)


def open_pipeline(spec: str, base: str | None, args: argparse.Namespace) -> Any:
    """The pipeline of ``open_model``."""
    return open_model(spec, base, args).pipeline
