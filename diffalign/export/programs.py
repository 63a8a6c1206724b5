"""Instructions for loading an export in each program. No torch."""

import shlex
from pathlib import Path

from diffalign.models.families.registry import FAMILIES


def how_to_load(to: str, path: Path, family: str) -> list[str]:
    """Return one line for each program that loads an export.

    Args:
        to: format of ``diffalign export``.
        path: of the export.
        family: of the model.
    """
    name = path.stem
    if to in ("kohya", "comfyui"):
        stable_diffusion = FAMILIES[family].files.layout == "kohya"
        node = "LoraLoader" if stable_diffusion else "LoraLoaderModelOnly"
        lines = [f"ComfyUI: put {path.name} into models/loras; node {node}, strength 1"]
        if stable_diffusion:
            lines += [
                f"A1111, Forge: put {path.name} into models/Lora; prompt <lora:{name}:1>",
                f"kohya's scripts: --network_weights {shlex.quote(str(path))}",
                f'diffusers: pipeline.load_lora_weights("{path}")',
            ]
        return lines
    if to == "single-file":
        return [
            f"ComfyUI: put {path.name} into models/checkpoints; node CheckpointLoaderSimple",
            f"A1111, Forge: put {path.name} into models/Stable-diffusion",
            f'diffusers: {FAMILIES[family].pipeline}.from_single_file("{path}")',
        ]
    if to == "merged":
        return [f'diffusers: DiffusionPipeline.from_pretrained("{path}")']
    return [f'diffusers: pipeline.load_lora_weights("{path}")']


def trained_lora(run: Path, family: str) -> list[str]:
    """Return how programs other than diffusers get a LoRA run of a Stable Diffusion: an export."""
    file = run / f"{run.name}.safetensors"
    lines = how_to_load("kohya", file, family)
    return [
        f"diffalign export {shlex.quote(str(run))} --to kohya --output {shlex.quote(str(file))}",
        *(line for line in lines if not line.startswith("diffusers")),
    ]
