"""Decoding of image files, and of videos frame by frame, to RGB pixels.

EXIF orientation is applied, transparency is composited over white, every mode becomes RGB, and a truncated
file is unreadable. Resizing is PIL's Lanczos, whose support grows with the reduction (antialiased).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.data.encoding.geometry import Cut, Size
from diffalign.media.images import opened
from diffalign.media.videos import read_frames

_ORIENTATION = 0x0112  # EXIF tag
_ON_THE_SIDE = frozenset({5, 6, 7, 8})  # EXIF orientations that swap height and width


def image_size(content: bytes) -> Size:
    """Return (height, width) as displayed, from the file's header alone; raise one of UNREADABLE if it is no
    image."""
    with opened(content) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _ON_THE_SIDE
    return (width, height) if turned else (height, width)


def cut_image(image: Image.Image, cut: Cut) -> Image.Image:
    """Return the crop of an image, of the cut's target size."""
    (height, width), (top, left), target = cut.resized, cut.corner, cut.target
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + target[1], top + target[0]))


def cut_out(image: Image.Image, cut: Cut) -> Tensor:
    """Return the crop of an image: uint8 (3, H, W) of the cut's target size."""
    return torch.from_numpy(np.array(cut_image(image, cut))).permute(2, 0, 1).contiguous()


def cut_clip(content: bytes, cut: Cut) -> Tensor:
    """Return the crop of a video's file: uint8 (3, F, H, W) of the cut's size, number of frames and rate.

    Frames are cropped as they are decoded, so that only small ones are in memory. One of UNREADABLE is raised
    if it is no video or damaged.
    """
    frames = read_frames(content, lambda frame: cut_out(Image.fromarray(frame), cut), cut.fps, cut.frames)
    return frames.transpose(0, 1)


def to_unit(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0
