"""Image files to RGB pixels."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What PIL raises for files that are no image, or damaged ones."""


def why_unreadable(error: BaseException) -> str:
    """What is wrong with a file, for the user, of one of UNREADABLE."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image that PIL knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def decode(content: bytes) -> Image.Image:
    """The image of a file in RGB; one of UNREADABLE is raised if it is none or damaged."""
    with Image.open(BytesIO(content)) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent becomes white."""
    if image.mode.startswith("I;16"):  # PIL would clip 16-bit greys at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
