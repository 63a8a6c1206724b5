"""Build the flow models of the package data: tiny SD3, and tiny Wan with its autoencoder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffalign.tiny_build import flow_networks, report, sd3, video_autoencoder, wan
from diffalign.tiny_build.flow_training import Plan
from diffalign.tiny_build.saving import forget_paths, half, replace_folder, save_pipeline, say


def flow_plan(
    out: Path, part: str, seconds: float, rate: float, seed: int, resume: bool
) -> tuple[Plan, Path]:
    """Return the training plan of a part, and the path of its checkpoint, which is deleted at the end."""
    keep = out / f".{part}.partial.pt"
    if not resume:
        keep.unlink(missing_ok=True)
    return Plan(seconds, rate, keep, seed), keep


def _sd3(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    vae, parts = sd3.centred(out / "sdxl" / "vae"), sd3.Parts()
    plan, keep = flow_plan(out, "sd3", seconds, sd3.RATE, seed, resume)
    if resume and not keep.exists():
        without = {"text_encoder_3": None, "tokenizer_3": None}
        parts.restore(DiffusionPipeline.from_pretrained(out / "sd3", **without))
    else:
        sd3.borrow_text(parts, DiffusionPipeline.from_pretrained(out / "sdxl"))
    figures: dict[str, Any] = sd3.train(parts, vae, plan, say)
    pipe = sd3.pipeline(parts, vae)
    save_pipeline(pipe, out / "sd3")
    keep.unlink(missing_ok=True)
    for guidance, tokens in ((1.0, 8), (2.0, 8), (2.0, 256)):
        base = report.base(pipe, guidance=guidance, max_sequence_length=tokens)
        figures.update({f"{name}_guidance_{guidance:g}_tokens_{tokens}": v for name, v in base.items()})
    return figures


def _wan_vae(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    """Train Wan's autoencoder; if finished weights exist and `resume` is set, only its decoder."""
    torch.manual_seed(seed)
    plan, keep = flow_plan(out, "wan_vae", seconds, video_autoencoder.RATE, seed, resume)
    begun = resume and not keep.exists()
    vae = video_autoencoder.load(out / "wan" / "vae") if begun else flow_networks.wan_vae()
    figures = video_autoencoder.train(vae, plan, say, decoder_only=begun)

    def save(fresh: Path) -> None:
        vae.save_pretrained(fresh)
        forget_paths(fresh)
        half(fresh)

    replace_folder(out / "wan" / "vae", save)
    keep.unlink(missing_ok=True)
    return figures


def _wan(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(seed)
    vae, parts = video_autoencoder.load(out / "wan" / "vae"), wan.Parts()
    plan, keep = flow_plan(out, "wan", seconds, wan.RATE, seed, resume)
    if resume and not keep.exists():
        parts.restore(DiffusionPipeline.from_pretrained(out / "wan"))
    figures: dict[str, Any] = wan.train(parts, vae, plan, say)
    pipe = wan.pipeline(parts, vae)
    save_pipeline(pipe, out / "wan")
    keep.unlink(missing_ok=True)
    for guidance, tokens in ((1.0, 24), (3.0, 24), (3.0, 512)):
        base = report.video_base(pipe, guidance=guidance, tokens=tokens)
        figures.update({f"{name}_guidance_{guidance:g}_tokens_{tokens}": v for name, v in base.items()})
    return figures


FLOWS = {"sd3": _sd3, "wan_vae": _wan_vae, "wan": _wan}
