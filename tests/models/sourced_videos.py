"""Pairs of videos with a source image each, and a short run of DPO on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
)
from diffalign.media.videos import Video, write_video

Size = tuple[int, int, int]  # height, width, frames


def rows_in(folder: Path, size: Size, picture: Callable[[int], Image.Image], sourced: bool = True) -> Path:
    """Write six pairs of videos of noise, with a source each, the number's picture."""
    folder.mkdir(parents=True)
    height, width, count = size
    lines = []
    for number in range(6):
        names = [f"{number}-{side}.mp4" for side in "ab"]
        for file, seed in zip(names, (2 * number, 2 * number + 1), strict=True):
            levels = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 6), dtype=np.uint8)
            frames = torch.from_numpy(levels).repeat_interleave(height // 4, 2)
            write_video(
                Video(frames.repeat_interleave(width // 6, 3)[..., : width // 2 * 2], 8.0), folder / file
            )
        picture(number).save(folder / f"{number}.png")
        row = {"prompt": f"circle {'abcdef'[number]}", "videos": names, "scores": [1, 0]}
        lines.append(json.dumps(row | ({"source": f"{number}.png"} if sourced else {})))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


def run_of(model: ModelConfig, pairs: Path, output: Path, size: Size, **others: Any) -> Run:
    """Return two steps of DPO."""
    return Run(
        output=str(output),
        method={"type": "dpo", "beta": 100},
        model=model,
        data=DataConfig(
            path=str(pairs), height=size[0], width=size[1], frames=size[2], fps=8, holdout=0.4, flip=True
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        training=TrainingConfig(steps=2, batch_size=2),
        logging=LoggingConfig(every=1, trackers=(), diagnostics_bins=1),
        checkpoint=CheckpointConfig(every=2),
        **others,
    )
