"""Fixtures: generated images, sets in every format, and a model with arithmetic encoders."""

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

from diffalign.config.schema import DataConfig
from diffalign.data import encode_preferences, read_preferences


def picture(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(seed: int, width: int = 40, height: int = 40) -> bytes:
    buffer = BytesIO()
    picture(seed, width, height).save(buffer, "PNG")
    return buffer.getvalue()


def row(seed: int, labels=(1.0, 0.0), prompt: str | None = None, sizes=((40, 40), (40, 40)), **other) -> dict:
    """Return a row of Pick-a-Pic's schema with two images of its own."""
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
    sources: None = None

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


@dataclass
class VideoModel(Model):
    """Latents of videos: the first is the first frame, each further one the mean of four."""

    fewest: int = 1

    def encode_pixels(self, pixels):
        frames = [pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)]
        assert pixels.ndim == 5 and frames[-1].shape[2] in (1, 4)
        made = torch.stack([frame.mean(2) for frame in frames], dim=2)
        mean, std = super().encode_pixels(made.transpose(1, 2).flatten(0, 1))
        self.batches[-1] = tuple(pixels.shape)
        return tuple(
            moment.unflatten(0, (len(pixels), -1)).transpose(1, 2).contiguous() for moment in (mean, std)
        )

    def usable_frames(self, frames):
        return 0 if frames < self.fewest else 1 + (frames - 1) // 4 * 4

    def latent_frames(self, frames):
        return 1 + (frames - 1) // 4

    def frames_of(self, latent_frame):
        return range(4 * latent_frame - 3, 4 * latent_frame + 1) if latent_frame else range(1)


def film(
    path: Path, seed: int, frames: int = 24, fps: float = 8.0, width: int = 48, height: int = 32
) -> Path:
    """Return a video of a coloured block that moves over a coloured ground, different for each seed."""
    from diffalign.media.videos import Video, write_video

    colors = np.random.default_rng(seed).integers(0, 256, (2, 3))
    pixels = torch.from_numpy(colors[0].astype(np.uint8)).view(1, 3, 1, 1).repeat(frames, 1, height, width)
    for number in range(frames):
        left = 2 * number % (width - 8)
        pixels[number, :, 8:16, left : left + 8] = torch.from_numpy(colors[1].astype(np.uint8))[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(Video(pixels, fps), path)
    return path
