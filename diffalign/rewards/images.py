"""The image inputs of rewards: PIL images, or pixels (B, 3, H, W) in [0, 1]."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.media.images import to_rgb
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
        ValueError: counts or shapes do not match, a prompt that stands for several, pixels of another range,
            or ``images`` holds videos or other things than images.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the text {prompts[:60]!r}; allowed: a list of one prompt per image")
    if isinstance(images, Tensor):
        _check_pixels(images)
    else:
        images = _checked(images)
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(images)} images but {len(prompts)} prompts: there must be one prompt per image"
        )
    scores = [
        score(_in_rgb(images[i : i + batch_size]), list(prompts[i : i + batch_size])).float()
        for i in range(0, len(images), batch_size)
    ]
    return torch.cat(scores) if scores else torch.zeros(0)


def _in_rgb(images: Images) -> Images:
    """Convert PIL images as files are converted: sRGB, with white behind what is transparent."""
    return images if isinstance(images, Tensor) else [to_rgb(image) for image in images]


def _checked(images: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """Return PIL images; ValueError for anything else."""
    if isinstance(images, Image.Image):
        raise ValueError("images is one PIL image; allowed: a list of images")
    images = list(images)
    if any(isinstance(image, Video) for image in images):
        raise ValueError(
            "these are videos, and this is a reward of images; rewards.videos.takes_videos(reward) gives "
            "the mean over frames"
        )
    odd = next((image for image in images if not isinstance(image, Image.Image)), None)
    if odd is not None:
        raise ValueError(
            f"images holds a {type(odd).__name__}; allowed: PIL images (PIL.Image.open of a file, "
            "PIL.Image.fromarray of an array), or a float tensor (B, 3, H, W) in [0, 1]"
        )
    return images


SLACK = 0.5
"""How far pixels may lie outside [0, 1]: less than [-1, 1] and bytes do, more than interpolation does."""


def _check_pixels(pixels: Tensor) -> None:
    """Check the shape and the range of pixels, the latter where that makes no training step wait.

    Raises:
        ValueError: another shape or type, or values of another range, such as an autoencoder's [-1, 1].
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"pixels must be a float tensor (B, 3, H, W) in [0, 1], got {pixels.dtype} of shape "
            f"{tuple(pixels.shape)}"
        )
    if pixels.numel() == 0 or (pixels.requires_grad and pixels.device.type != "cpu"):
        return
    low, high = (value.item() for value in pixels.detach().aminmax())
    if low < -SLACK or high > 1 + SLACK:
        raise ValueError(
            f"pixels are from {low:.3g} to {high:.3g}; allowed: [0, 1] (of an autoencoder's output in "
            "[-1, 1]: x / 2 + 0.5; of bytes: x / 255)"
        )


def to_pil(images: Images) -> list[Image.Image]:
    """Return RGB PIL images; pixels are rounded to 8 bits, as they would be when saved to a file."""
    if not isinstance(images, Tensor):
        return [image.convert("RGB") for image in images]
    array = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(a)) for a in array.permute(0, 2, 3, 1).cpu().numpy()]
