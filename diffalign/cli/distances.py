"""FID and LPIPS on the command line of ``diffalign evaluate``."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffalign.cli.common import device_name

if TYPE_CHECKING:
    from diffalign.evaluation.evaluate import Evaluation
    from diffalign.evaluation.measuring.perceptual import PerceptualSettings


def add_distance_options(group: "argparse._ArgumentGroup") -> None:
    """Add --fid and --lpips."""
    group.add_argument(
        "--fid",
        metavar="FOLDER",
        help="FID of all models against the real images in this folder (pip install 'diffalign[metrics]')",
    )
    group.add_argument(
        "--lpips",
        action="store_true",
        help="LPIPS of aligned to base images, and among the images of a prompt (diffalign[metrics])",
    )


def perceptual_settings(args: argparse.Namespace) -> "PerceptualSettings | None":
    """Return what --fid and --lpips ask for; UserError for a folder without images, or a missing package."""
    if args.fid is None and not args.lpips:
        return None
    from diffalign.evaluation.measuring.feature_networks import load_inception, load_lpips
    from diffalign.evaluation.measuring.perceptual import PerceptualSettings, real_images

    real = None if args.fid is None else Path(args.fid)
    if real is not None:
        real_images(real)
    device = device_name(args.device)
    return PerceptualSettings(real, args.lpips, lambda: load_inception(device), lambda: load_lpips(device))


def perceptual_notes(evaluation: "Evaluation", args: argparse.Namespace) -> list[str]:
    """Return what to know about FID and LPIPS as they were measured."""
    notes = [] if evaluation.fid is None else [evaluation.fid.caution]
    if args.lpips and "lpips_diversity" not in {change.name for change in evaluation.statistics}:
        notes.append("every prompt has one image, so there is no LPIPS diversity; see --images-per-prompt")
    return [note for note in notes if note]


def distance_lines(model: Mapping[str, Any]) -> list[str]:
    """Return a line each on FID and LPIPS, those that were measured."""
    lines, spread = [], model.get("image_statistics", {}).get("lpips_diversity")
    if fid := model.get("fid"):
        counts = f"{fid['images']:,} images of each against {fid['real']:,} real ones"
        lines.append(f"FID {fid['base']:.2f} -> {fid['aligned']:.2f} ({fid['change']:+.2f}; {counts})")
    if found := model.get("lpips_to_base"):
        low, high = found["ci95"]
        lines.append(f"LPIPS to the base {found['value']:.4f} [{low:.4f}, {high:.4f}]")
    if spread:
        low, high = spread["change_ci95"]
        change = f"{spread['change']:+.4f} [{low:+.4f}, {high:+.4f}]"
        lines.append(f"LPIPS diversity {spread['base']:.4f} -> {spread['aligned']:.4f} ({change})")
    return lines
