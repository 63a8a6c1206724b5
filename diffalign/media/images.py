"""Decode image files of an allow-list of formats into RGB images."""

import os
import stat
import struct
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffalign.media.profiles import to_srgb

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO")
"""Formats that are decoded. For some others PIL starts external programs (Ghostscript for EPS)."""

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".ppm",
)  # fmt: skip

UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""The exceptions that PIL raises for files that are damaged or no images."""

_OF_FRAMES = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
"""Formats of animations and pages. A JPEG's second picture is no frame: a gain map or depth of the first."""

_EIGHT, _SIXTEEN, _THIRTY_TWO = 2**8 - 1, 2**16 - 1, 2**32 - 1  # largest values of unsigned integers


def why_unreadable(error: BaseException) -> str:
    """Return the reason why a file is unreadable, as text for the user; ``error`` is one of UNREADABLE."""
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextmanager
def opened(source: bytes | Path | str) -> Iterator[Image.Image]:
    """Open an image file of one of ``FORMATS``, recognised by its content; pixels are decoded lazily.

    Raises:
        one of UNREADABLE: the file is no image, or of another format.
    """
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]  # builds of PIL may lack formats
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
        yield image


def read_file(path: Path | str) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is a device or a pipe, whose content may be endless.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # else a pipe without a writer blocks


def decode(content: bytes) -> Image.Image:
    """Decode an encoded image to RGB and apply its EXIF orientation.

    Raises:
        one of UNREADABLE: it is no image, or damaged.
    """
    with opened(content) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def has_further_frames(content: bytes) -> bool:
    """Return whether an image file is an animation or has several pages, of which ``decode`` reads the first.

    Raises:
        one of UNREADABLE: it is no image.
    """
    with opened(content) as image:
        return image.format in _OF_FRAMES and bool(getattr(image, "is_animated", False))


def note_on_frames(names: Collection[str]) -> str:
    """Return a note on image files that have further frames or pages; "" for none."""
    if not names:
        return ""
    some = "1 image file has" if len(names) == 1 else f"{len(names):,} image files have"
    return (
        f"{some} several frames or pages (an animation), of which the first alone is read, such as "
        f"{next(iter(names))}"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB in sRGB; transparent images are composited over white.

    Raises:
        ValueError: a grey image of 32 bits or of floats whose range of values is not recognised.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_eight_bits(np.asarray(image), image.mode))
    image = to_srgb(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey values (H, W) of more than 8 bits to uint8; PIL's own conversion clips them at 255.

    16-bit greys use their full range. For 32-bit integers and floats the file does not state the range. It is
    taken to be the smallest of 8, 16 and 32 bits (for floats also 0 to 1) that contains all values.
    """
    if not np.isfinite(values).all():
        raise ValueError("grey values that are not finite")
    low, high = float(values.min()), float(values.max())
    ranges = (_SIXTEEN,) if mode.startswith("I;16") else (_EIGHT, _SIXTEEN, _THIRTY_TWO)
    top = next((top for top in ((1, *ranges) if mode == "F" else ranges) if high <= top), None)
    if low < 0 or top is None:
        raise ValueError(f"grey values from {low:g} to {high:g}; allowed: 0 to 1, 255, 65535 or 4294967295")
    return np.rint(values.astype(np.float64) / top * _EIGHT).astype(np.uint8)


def averaged(image: Image.Image, side: int) -> np.ndarray:
    """Downscale an image to (side, side, 3) uint8 by means over boxes.

    The result hardly depends on the image's size and encoding, so near duplicates are compared by it.
    """
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX))


def within(image: Image.Image, side: int) -> Image.Image:
    """Return a copy of at most ``side`` pixels a side with the same aspect ratio, never enlarged."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image
