"""The model and the pairs of the speed benchmark on a CPU: SDXL's classes at a size that trains in seconds.

Widths are 0.2 of SDXL's in the UNet (52 M parameters) and about as much in the encoders, with fewer layers of
transformers. At 256 px encoding an image takes 0.75 of the FLOPs of the UNet's forward, and a prompt 0.07
(SDXL at 1024 px: 0.72 and 0.02), so that what a tool spends on encoders weighs as much as it does at the real
size.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.sdxl_real_size import build
from diffalign.models.families.sdxl import CONFIGS

RESOLUTION = 256

DIFFERENT: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "block_out_channels": (64, 128, 256),
        "transformer_layers_per_block": (1, 2, 4),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 128 + 192,
        "projection_class_embeddings_input_dim": 6 * 256 + 192,
    },
    "vae": {"block_out_channels": (32, 32, 64, 64)},
    "text_encoder": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "projection_dim": 128,
    },
    "text_encoder_2": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "projection_dim": 192,
    },
}


def pipeline(
    folder: Path, different: Mapping[str, Mapping[str, Any]] = DIFFERENT, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the pipeline folder, once.

    Args:
        different: what differs from SDXL's configurations, by component.
        dtype: of its weights.
    """
    configs = {name: {**CONFIGS[name], **different.get(name, {})} for name in CONFIGS}
    return build(folder, configs, dtype)


def pairs(folder: Path, count: int, side: int = RESOLUTION) -> Path:
    """Write pairs of noise images as a table in Pick-a-Pic's columns, and return its folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    rows = [
        {
            "jpg_0": _jpeg(rng, side),
            "jpg_1": _jpeg(rng, side),
            "label_0": float(i % 2),
            "label_1": float(1 - i % 2),
            "caption": f"a picture number {i}",
        }
        for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


def _jpeg(rng: np.random.Generator, side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()
