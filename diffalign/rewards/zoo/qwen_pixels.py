"""Pre-processing of the vision towers of Qwen-VL models in plain torch.

Wang et al., arXiv 2409.12191; transformers' Qwen2VLImageProcessor. An image of any shape is resized, nearly
keeping its aspect ratio, to sides that are multiples of 28, and split into 14 x 14 patches; 2 x 2 patches
become one token. Frames are grouped in pairs: an image is a pair of equal frames. Qwen3-VL's patches are
16 x 16, and its pixels are normalised to [-1, 1].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.images import Images
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, as_tensor, normalised, scaled

_RATIO = 200  # largest aspect ratio


@dataclass(frozen=True)
class Cut:
    """Patches of B images or videos.

    Attributes:
        patches: (N, 3 T p p), normalised, float32, of all images in turn.
        grids: (B, 3) int64: number of frame pairs, rows and columns of patches of each image.
    """

    patches: Float[Tensor, "N C"]
    grids: Int[Tensor, "B 3"]


def interleaved(cuts: Sequence[Cut]) -> Cut:
    """Return the patches of several images a row: the first of each ``Cut``, then the second of each."""
    parts = [cut.patches.split(cut.grids.prod(1).tolist()) for cut in cuts]
    device = cuts[-1].patches.device
    return Cut(
        torch.cat([part.to(device) for row in zip(*parts, strict=True) for part in row]),
        torch.stack([cut.grids for cut in cuts], 1).flatten(0, 1),
    )


@dataclass(frozen=True)
class Pixels:
    """Resizing and patch extraction.

    Attributes:
        smallest: smallest number of pixels of a resized image.
        largest: largest number of pixels of a resized image.
        patch: side of a patch, in pixels.
        merge: side of a token, in patches.
        pair: frames of a patch.
        mean: mean of pixels in [0, 1], by channel.
        std: standard deviation of pixels in [0, 1], by channel.
    """

    smallest: int
    largest: int
    patch: int = 14
    merge: int = 2
    pair: int = 2
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) of the resized image.

        The operations and their order are those of the published code, since the last bit of the floating
        point result decides whether an exact multiple is rounded down (a square of 1024 becomes 448, one of
        768 becomes 420).

        Raises:
            UserError: the aspect ratio exceeds 200.
        """
        if max(height, width) > _RATIO * min(height, width):
            raise UserError(
                f"a picture of {width} x {height} pixels: one side is more than {_RATIO} times the other"
            )
        side = self.patch * self.merge
        new = [max(side, round(length / side) * side) for length in (height, width)]
        if new[0] * new[1] > self.largest:
            beta = math.sqrt((height * width) / self.largest)
            new = [math.floor((length / beta) / side) * side for length in (height, width)]
        elif new[0] * new[1] < self.smallest:
            beta = math.sqrt(self.smallest / (height * width))
            new = [math.ceil((length * beta) / side) * side for length in (height, width)]
        return new[0], new[1]

    def images(self, images: Images) -> Cut:
        """Return the patches of images.

        PIL images are resized by PIL (the exact path), pixels (B, 3, H, W) in [0, 1] differentiably
        (antialiased bicubic, clamped).
        """
        small = self.resized(images)
        if isinstance(small, Tensor):
            return self.cut([picture[None] for picture in small])
        return self.cut([as_tensor(image)[None] for image in small])

    def resized(self, images: Images) -> Images:
        """Return the images resized: PIL images, or pixels clamped to [0, 1]."""
        if isinstance(images, Tensor):
            return scaled(images, *self.size(images.shape[2], images.shape[3])).clamp(0, 1)
        return [self._pil(image) for image in images]

    def _pil(self, image: Image.Image) -> Image.Image:
        height, width = self.size(image.height, image.width)
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    def frames(self, frames: UInt8[Tensor, "F 3 H W"]) -> Float[Tensor, "F 3 h w"]:
        """Resize the frames of a video (antialiased bicubic, rounded to 8 bits); the result is in [0, 1]."""
        height, width = self.size(frames.shape[2], frames.shape[3])
        return scaled(frames, height, width).clamp(0, 255).round() / 255

    def cut(self, pictures: Sequence[Float[Tensor, "_ 3 _ _"]]) -> Cut:
        """Split resized images or videos in [0, 1] into normalised patches.

        A single frame is doubled; other numbers of frames must be even.
        """
        rows, grids = [], []
        for picture in pictures:
            frames = normalised(picture.float(), self.mean, self.std)
            frames = frames.expand(self.pair, -1, -1, -1) if len(frames) == 1 else frames
            time, high, wide = (
                len(frames) // self.pair,
                frames.shape[2] // self.patch,
                frames.shape[3] // self.patch,
            )
            split = frames.reshape(
                time, self.pair, 3, high // self.merge, self.merge, self.patch,
                wide // self.merge, self.merge, self.patch,
            )  # fmt: skip
            # order: tokens row by row, patches of a token, then channel, frame, row and column of a patch
            ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            rows.append(ordered.reshape(time * high * wide, 3 * self.pair * self.patch**2))
            grids.append([time, high, wide])
        return Cut(torch.cat(rows), torch.tensor(grids))
