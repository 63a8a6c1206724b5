"""Build the tiny SDXL of 64 pixels, which draws patterned scenes, and its autoencoder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from diffalign.tiny import pipeline_path
from diffalign.tiny.worlds import PATTERNS
from diffalign.tiny_build import autoencoder, pretrain, report
from diffalign.tiny_build.build_flow import flow_plan
from diffalign.tiny_build.saving import forget_paths, half, replace_folder, save_pipeline, say

FAMILY = "sdxl64"
SCENES = 16_000  # of the corpus
GUIDANCES = (1.0, 3.0)  # of the measured base


def _vae(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    folder, inner = out / FAMILY / "vae", out / "sdxl" / "vae"
    inner = inner if inner.exists() else pipeline_path() / "vae"
    vae, figures = autoencoder.train(seconds, seed, say, folder if resume else None, FAMILY, inner)

    def save(fresh: Path) -> None:
        vae.save_pretrained(fresh)
        forget_paths(fresh)
        half(fresh)

    replace_folder(folder, save)
    return figures


def _pipeline(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    folder = out / FAMILY / "vae"
    if not folder.exists():
        raise FileNotFoundError(
            f"no autoencoder in {folder}; build it first: python -m diffalign.tiny_build.build sdxl64_vae"
        )
    torch.manual_seed(seed)
    vae, parts = AutoencoderKL.from_pretrained(folder).eval(), pretrain.Parts(FAMILY)
    plan, keep = flow_plan(out, FAMILY, seconds, pretrain.RATE, seed, resume)
    if resume and not keep.exists():
        before = StableDiffusionXLPipeline.from_pretrained(out / FAMILY)
        parts.load_state_dict({**parts.state_dict(), **pretrain.weights(FAMILY, before)})
    data = pretrain.Latents(parts, vae, SCENES, seed)
    size = sum(p.numel() for p in parts.parameters())
    say(f"{FAMILY}: {size / 1e6:.2f}M parameters, {SCENES} pictures encoded")
    figures: dict[str, Any] = pretrain.train_alone(parts, data, plan, say)
    pipe = pretrain.pipeline(parts, vae)
    save_pipeline(pipe, out / FAMILY)
    keep.unlink(missing_ok=True)
    for guidance in GUIDANCES:
        base = report.base(pipe, count=256, guidance=guidance, world=PATTERNS)
        figures.update({f"{name}_guidance_{guidance:g}": value for name, value in base.items()})
    return figures


def _judges(out: Path, seconds: float, seed: int, resume: bool) -> dict[str, Any]:
    return {**report.judges(seed, world=PATTERNS)}


PARTS = {"sdxl64_vae": _vae, FAMILY: _pipeline, "pattern_judges": _judges}
