"""Convert images with an ICC profile, such as photos in Display P3 or prints in CMYK, to sRGB."""

from functools import lru_cache
from io import BytesIO

from PIL import Image, ImageCms

_SPACES = {"RGB": "RGB", "RGBA": "RGB", "CMYK": "CMYK"}
"""Colour space that a profile must be of, by the mode of the image."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Return an image in sRGB, relative colorimetric, as browsers show it; its alpha is kept.

    Unchanged are images without a profile, of a mode other than RGB, RGBA and CMYK, with a profile whose
    description names sRGB, and with one that is damaged or of another colour space (browsers ignore those).
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in _SPACES:
        return image
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        described = ImageCms.getProfileDescription(source)
        if source.profile.xcolor_space.strip() != _SPACES[mode] or "srgb" in described.lower():
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            target,
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
