"""A fake pipeline whose pixels show the noise and prompt that an image depends on."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn


@dataclass
class Painted:
    images: list


@dataclass
class Filmed:
    frames: torch.Tensor


@dataclass
class PaintingPipeline:
    """Images of 8 x 8 pixels from each generator's own draws, brighter by ``lift``; remembers its calls."""

    lift: int = 0
    network: nn.Module = field(default_factory=lambda: nn.Linear(2, 2))
    calls: list[dict[str, Any]] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    @property
    def components(self):
        return {"unet": self.network, "scheduler": None, "tokenizer": object()}

    def set_progress_bar_config(self, **options):
        assert options == {"disable": True}

    def __call__(
        self, prompt, generator, output_type, num_inference_steps=3, guidance_scale=1.0, height=8, width=8
    ):
        self.trained.append(self.network.training)
        self.calls.append({"prompt": prompt, "steps": num_inference_steps, "guidance": guidance_scale})
        assert output_type == "pil" and len(prompt) == len(generator)
        images = []
        for g in generator:
            assert g.device == torch.device("cpu")
            noise = torch.randint(0, 200, (height, width, 3), generator=g).numpy()
            images.append(Image.fromarray((noise + self.lift).astype(np.uint8)))
        return Painted(images)


@dataclass
class FilmingPipeline(PaintingPipeline):
    """Videos of noisy squares of 12 pixels on a grey ground, going ``speed`` pixels a frame to the right."""

    speed: int = 1

    def __call__(
        self, prompt, generator, output_type, num_inference_steps=3, guidance_scale=1.0, height=32, width=32,
        num_frames=5, frame_rate=8, max_sequence_length=16,
    ):  # fmt: skip
        self.trained.append(self.network.training)
        self.calls.append(
            {"prompt": prompt, "frames": num_frames, "rate": frame_rate, "steps": num_inference_steps}
        )
        assert output_type == "pt" and len(prompt) == len(generator)
        videos = torch.full((len(prompt), num_frames, 3, height, width), 0.4)
        for video, g in zip(videos, generator, strict=True):
            square = torch.randint(180, 240, (3, 12, 12), generator=g) + self.lift
            for k, frame in enumerate(video):
                left = 2 + self.speed * k
                frame[:, 10:22, left : left + 12] = square / 255
        return Filmed(videos)


def brightness(images, prompts):
    return torch.tensor([float(np.asarray(i).mean()) for i in images])
