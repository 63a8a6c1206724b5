"""Measure LoRA-DPO steps of an SDXL of real size with random weights: seconds, pairs a second, peak memory.

    python -m benchmarks.sdxl_real_size --resolution 256 --steps 2              # CPU
    python -m benchmarks.sdxl_real_size --resolution 1024 --steps 20 --batch 2  # a GPU

The pipeline folder (7 GB under --folder) is built once from the real configurations (UNet, both text
encoders, VAE) with random weights in bfloat16, then goes the way of any checkpoint: loading, encoding, cache,
LoRA, steps, saving. Results are appended to ``benchmarks/sdxl_real_size.json``.
"""

import argparse
import io
import json
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign import tiny
from diffalign.config.schema import (
    DataConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.models.families.sdxl import CONFIGS
from diffalign.runs.align import align

Configs = Mapping[str, Mapping[str, Any]]
RESULTS = Path(__file__).with_suffix(".json")


def build(folder: Path, configs: Configs = CONFIGS, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a pipeline folder with random weights, of real size unless other configurations are given.

    Components are made and written one at a time to save memory.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    if (folder / "model_index.json").exists():
        return folder
    with torch.device("meta"):
        empty: list[tuple[str, Any]] = [
            ("unet", UNet2DConditionModel(**configs["unet"])),
            ("vae", AutoencoderKL(**configs["vae"])),
        ]
        for name, text in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            values = {k: v for k, v in configs[name].items() if k != "architectures"}
            empty.append((name, text(CLIPTextConfig(**values))))
    while empty:
        name, module = empty.pop()
        filled(module, dtype).save_pretrained(folder / name)
        del module
    for name in ("tokenizer", "tokenizer_2"):
        words = CLIPTokenizer.from_pretrained(tiny.pipeline_path("sdxl") / "tokenizer")
        words.model_max_length = 77
        words.save_pretrained(folder / name)
    EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        timestep_spacing="leading",
    ).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def filled(module: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Fill a module of the meta device with random weights: matrices as by a linear layer's default, norms 1.

    Biases are 0. One block of random numbers is repeated, since drawing billions of them would be slow.
    """
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(dtype)
    module.to(dtype).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            flat = parameter.view(-1)
            if parameter.ndim < 2:
                flat.zero_()
                continue
            scale = parameter[0].numel() ** -0.5 / 3**0.5
            for start in range(0, len(flat), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)] * scale)
        for part in module.modules():
            if "Norm" in type(part).__name__ and getattr(part, "weight", None) is not None:
                part.weight.fill_(1)
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module


def pairs(folder: Path, count: int, side: int) -> Path:
    """Write random pairs of noise images as a folder set."""
    rng = np.random.default_rng(0)
    for kind in ("w", "l"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        for kind in ("w", "l"):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, format="PNG")
            (folder / kind / f"{i}.png").write_bytes(buffer.getvalue())
        (folder / "w" / f"{i}.txt").write_text(f"a picture number {i}")
    return folder


def main() -> None:
    """Build, train, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "diffalign-sdxl-random")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1, help="pairs a step")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()

    model = build(arguments.folder)
    output = Path(tempfile.mkdtemp(prefix="diffalign-run-"))
    data = pairs(output / "pairs", max(2, arguments.batch), arguments.resolution)
    run = Run(
        output=str(output / "run"),
        method={"type": "dpo", "beta": 5000.0},
        model=ModelConfig(
            path=str(model),
            dtype="bfloat16",
            lora=LoraConfig(rank=16),
            gradient_checkpointing=arguments.checkpointing,
        ),
        data=DataConfig(path=str(data), resolution=arguments.resolution, holdout=0.0, cache_batch_size=1),
        optimizer=OptimizerConfig(learning_rate=1e-5),
        training=TrainingConfig(steps=arguments.steps, batch_size=arguments.batch, mixed_precision="bf16"),
        logging=LoggingConfig(every=1),
    )
    started = time.monotonic()
    result = align(run)
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    cuda = torch.cuda.is_available()
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": torch.cuda.get_device_name()
        if cuda
        else f"{torch.get_num_threads()} CPU threads, {platform.machine()}",
        "torch": torch.__version__,
        "command": f"python -m benchmarks.sdxl_real_size --resolution {arguments.resolution} "
        f"--steps {arguments.steps} --batch {arguments.batch} "
        f"--{'' if arguments.checkpointing else 'no-'}checkpointing",
        "steps": result.steps,
        "seconds_per_step": round(result.seconds / result.steps, 2),
        "pairs_per_second": round(arguments.batch * result.steps / result.seconds, 4),
        "whole_run_seconds": round(time.monotonic() - started, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_gpu_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
        "loss": [row["loss"] for row in metrics if "loss" in row],
    }
    shutil.rmtree(output)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*known, record], indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
