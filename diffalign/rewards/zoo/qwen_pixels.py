"""Pixels as Qwen2-VL's vision tower takes them (Wang et al., arXiv 2409.12191; transformers'
Qwen2VLImageProcessor), in plain torch.

A picture of any shape is scaled, nearly keeping its aspect, to sides that are multiples of 28, and cut into
14 x 14 patches; two by two patches become one token. Frames go in pairs: a picture is a pair of equal frames.
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

_RATIO = 200  # of the sides, at most


@dataclass(frozen=True)
class Cut:
    """What one or several pictures or videos become.

    Attributes:
        patches: (N, 3 T p p), normalised, float32; those of each picture in turn.
        grids: (B, 3) int64: pairs of frames, rows and columns of patches.
    """

    patches: Float[Tensor, "N C"]
    grids: Int[Tensor, "B 3"]


@dataclass(frozen=True)
class Pixels:
    """How pictures are scaled and cut.

    Attributes:
        smallest: pixels of a scaled picture, at least (where both sides allow it).
        largest: at most.
        patch: pixels of a patch's side.
        merge: patches of a token's side.
        pair: frames of a patch.
    """

    smallest: int
    largest: int
    patch: int = 14
    merge: int = 2
    pair: int = 2

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the scaled picture; UserError for one that is too long and narrow.

        In floating point and in this order of operations, as the published code does it: whether a side that
        would fit exactly is rounded down to the next multiple depends on the last bit (a square of 1024
        becomes 448, one of 768 becomes 420).
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
        """PIL images by the exact path (PIL's bicubic), pixels (B, 3, H, W) in [0, 1] by a differentiable one
        (antialiased bicubic, clamped).
        """
        if isinstance(images, Tensor):
            small = scaled(images, *self.size(images.shape[2], images.shape[3])).clamp(0, 1)
            return self.cut([picture[None] for picture in small])
        return self.cut([self._pil(image)[None] for image in images])

    def _pil(self, image: Image.Image) -> Float[Tensor, "3 H W"]:
        height, width = self.size(image.height, image.width)
        return as_tensor(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))

    def frames(self, frames: UInt8[Tensor, "F 3 H W"]) -> Float[Tensor, "F 3 h w"]:
        """Frames of a video, scaled (antialiased bicubic, rounded to 8 bits), in [0, 1]."""
        height, width = self.size(frames.shape[2], frames.shape[3])
        return scaled(frames, height, width).clamp(0, 255).round() / 255

    def cut(self, pictures: Sequence[Float[Tensor, "_ 3 _ _"]]) -> Cut:
        """Scaled pictures in [0, 1] as normalised patches; a single frame is taken twice, others are even."""
        rows, grids = [], []
        for picture in pictures:
            frames = normalised(picture.float(), OPENAI_MEAN, OPENAI_STD)
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
            # tokens in reading order, in each its patches, in each patch channel, frame, row, column
            ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            rows.append(ordered.reshape(time * high * wide, 3 * self.pair * self.patch**2))
            grids.append([time, high, wide])
        return Cut(torch.cat(rows), torch.tensor(grids))
