"""``diffalign export``: an aligned model for diffusers, kohya, A1111, Forge and ComfyUI."""

import sys
from collections.abc import Sequence
from pathlib import Path

from diffalign.cli.common import make_parser, number, output_path, parse
from diffalign.errors import UserError
from diffalign.utils.places import place_to_write


def run(argv: Sequence[str]) -> int:
    """Write the model that the arguments name."""
    parser = make_parser("export", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "model",
        help="a run directory, a checkpoint of one, an aligned/ folder, a LoRA file, a fine-tuned pipeline",
    )
    parser.add_argument(
        "--to", "--format", dest="to", required=True, metavar="FORMAT",
        help="diffusers, kohya, comfyui, merged or single-file",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=output_path, metavar="PATH",
        help="folder or .safetensors; default: RUN/export/FORMAT",
    )  # fmt: skip
    parser.add_argument("--base", metavar="MODEL", help="base model of a LoRA or pipeline outside of a run")
    parser.add_argument(
        "--strength", type=number(float, -10, 10), default=1.0, help="factor of the change; default 1"
    )
    parser.add_argument("--rank", type=number(int, 1), metavar="N", help="lower the LoRA's rank by SVD")
    parser.add_argument(
        "--mix",
        action="append",
        default=[],
        metavar="LORA=WEIGHT",
        help="add another LoRA, or a run's; may be repeated",
    )
    parser.add_argument(
        "--dtype",
        help="of what is written: float16, bfloat16, float32; default: a LoRA's own, if merged the run's",
    )
    parser.add_argument("--title", help="name of the model and of its file; default: the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    args = parse(parser, argv)
    from diffalign.export.job import FORMATS, Export
    from diffalign.export.job import export as write
    from diffalign.export.programs import how_to_load
    from diffalign.runs.exporting import exportable

    if args.to not in FORMATS:
        from diffalign.errors import unknown

        raise unknown("format (--to)", args.to, FORMATS)
    found = exportable(args.model, args.base)
    title = args.title or found.title
    output = place_to_write(args.output or str(found.exports / args.to))
    settings = Export(
        args.to,
        output,
        title,
        args.strength,
        args.rank,
        args.dtype,
        args.overwrite,
        found.card(args.to == "diffusers") if args.to in ("diffusers", "merged") else "",
    )
    path = write(
        found.base, found.source, settings, [_weighted(text) for text in args.mix],
        lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    for line in how_to_load(args.to, path, found.family):
        print(line)
    return 0


def _weighted(text: str) -> tuple[Path, float]:
    """Return (path, weight) of LORA=WEIGHT, or of LORA with weight 1.

    Raises:
        UserError: a weight that is no number, or no such LoRA.
    """
    path, mark, weight = text.rpartition("=")
    try:
        result = (Path(path), float(weight)) if mark else (Path(text), 1.0)
    except ValueError:
        raise UserError(f"--mix {text!r}: {weight!r} is no number; allowed: LORA=0.5") from None
    if not result[0].exists():
        raise UserError(f"--mix {text!r}: {result[0]} is not there; allowed: a LoRA's file or folder")
    if result[1] != result[1] or abs(result[1]) == float("inf"):
        raise UserError(f"--mix {text!r}: the weight must be finite")
    return result


DESCRIPTION = """\
Write an aligned model in the form that another program loads: a LoRA for diffusers, for kohya, A1111 and
Forge (kohya), for ComfyUI, a merged pipeline, or one checkpoint file. docs/export.md has a table of families
and formats."""

EXAMPLES = """
diffalign export runs/mine --to kohya
diffalign export runs/mine --to comfyui --output ~/ComfyUI/models/loras/mine.safetensors
diffalign export runs/mine --to single-file --dtype float16 --strength 0.8
diffalign export runs/mine --to kohya --rank 16 --mix style.safetensors=0.5
diffalign export runs/full --to kohya --rank 64
"""
