"""Images drawn on the spot, sets in every format, and a model whose encoders are arithmetic."""

import json
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.config import DataConfig
from diffalign.data import encode_preferences, read_preferences


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(seed: int, width: int = 40, height: int = 40) -> bytes:
    buffer = BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def row(seed: int, labels=(1.0, 0.0), prompt: str | None = None, sizes=((40, 40), (40, 40)), **other) -> dict:
    """A row of Pick-a-Pic's schema with two images of its own."""
    return {
        "caption": f"prompt {seed}" if prompt is None else prompt,
        "jpg_0": png(2 * seed, *sizes[0]),
        "jpg_1": png(2 * seed + 1, *sizes[1]),
        "label_0": labels[0],
        "label_1": labels[1],
        "has_label": labels[0] is not None,
        **other,
    }


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@dataclass
class Family:
    prompts: list[str] = field(default_factory=list)

    def encode_prompts(self, pipeline, prompts):
        self.prompts += prompts
        value = torch.tensor([float(sum(map(ord, prompt))) for prompt in prompts])
        return {
            "encoder_hidden_states": value[:, None, None].expand(-1, 3, 2).clone(),
            "text_embeds": value[:, None],
        }

    def micro_conditions(self, original_size, crop, target_size):
        return {"time_ids": torch.cat([original_size, crop, target_size], dim=1)}


@dataclass
class Model:
    """Latents are means over 8 x 8 pixels; the standard deviation is a tenth of 1 + |mean|."""

    fingerprint: str = "fake"
    family: Family = field(default_factory=Family)
    pipeline: None = None
    batches: list[tuple[int, ...]] = field(default_factory=list)
    fails_after: int | None = None

    def encode_prompts(self, prompts):
        return self.family.encode_prompts(self.pipeline, prompts)

    def negative(self, n):
        return {"encoder_hidden_states": torch.full((n, 3, 2), -1.0), "text_embeds": torch.full((n, 1), -1.0)}

    def encode_pixels(self, pixels):
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        assert pixels.dtype == torch.float32 and pixels.min() >= -1 and pixels.max() <= 1
        self.batches.append(tuple(pixels.shape))
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return mean, 0.1 * (1 + mean.abs())

    @property
    def images(self) -> int:
        return sum(shape[0] for shape in self.batches)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def encoded(tmp_path):
    """encoded(rows, **settings): an encoded set of those rows."""

    def make(rows, model=None, **settings):
        path = write_parquet(tmp_path / "pairs.parquet", rows)
        config = DataConfig(path=str(path), **{"resolution": 16, **settings})
        return encode_preferences(
            model or Model(), read_preferences(config), config, tmp_path / "cache", False
        )

    return make


def write_jsonl(path: Path, entries: list) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path
