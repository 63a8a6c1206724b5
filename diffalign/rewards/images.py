"""The image inputs of rewards: PIL images, or pixels (B, 3, H, W) in [0, 1]."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.media.videos import Video

Images = Sequence[Image.Image] | Tensor
"""B PIL images of any mode and size, or a float tensor (B, 3, H, W) in [0, 1]."""


def in_batches(
    score: Callable[[Images, list[str]], Tensor], images: Images, prompts: Sequence[str], batch_size: int
) -> Tensor:
    """Return scores (B,), float32, computed on ``batch_size`` images at a time; (0,) for no images.

    Args:
        score: maps a batch of b images and their prompts to scores (b,).
        images: B images.
        prompts: B prompts.
        batch_size: images a call of ``score``.

    Raises:
        ValueError: counts or shapes do not match, or ``images`` holds videos.
    """
    if not isinstance(images, Tensor) and any(isinstance(image, Video) for image in images):
        raise ValueError(
            "these are videos, and this is a reward of images; rewards.videos.takes_videos(reward) gives "
            "the mean over frames"
        )
    if isinstance(images, Tensor) and (
        images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()
    ):
        raise ValueError(
            f"pixels must be a float tensor (B, 3, H, W) in [0, 1], got {images.dtype} of shape "
            f"{tuple(images.shape)}"
        )
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images but {len(prompts)} prompts: there must be one prompt per image"
        )
    scores = [
        score(images[i : i + batch_size], list(prompts[i : i + batch_size])).float()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(scores) if scores else torch.zeros(0)


def to_pil(images: Images) -> list[Image.Image]:
    """Return RGB PIL images; pixels are rounded to 8 bits, as they would be when saved to a file."""
    if not isinstance(images, Tensor):
        return [image.convert("RGB") for image in images]
    array = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array.permute(0, 2, 3, 1).cpu().numpy()]
