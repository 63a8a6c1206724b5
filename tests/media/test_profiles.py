"""Images with an ICC profile are converted to sRGB."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from diffalign.media.files import open_image
from diffalign.media.images import decode
from diffalign.rewards.images import in_batches

SRGB_BYTES = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DISPLAY_P3 = {  # columns of its matrix to XYZ, adapted to D50
    "rXYZ": (0.51512, 0.24120, -0.00105),
    "gXYZ": (0.29198, 0.69225, 0.04189),
    "bXYZ": (0.15710, 0.06657, 0.78407),
}
SRGB = {
    "rXYZ": (0.43607, 0.22249, 0.01392),
    "gXYZ": (0.38515, 0.71687, 0.09708),
    "bXYZ": (0.14307, 0.06061, 0.71410),
}


def profile(columns: dict[str, tuple[float, float, float]], name: str = "Test") -> bytes:
    """Return sRGB's profile with other primaries and another name of as many letters."""
    data = bytearray(SRGB_BYTES.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be")))
    for at in range(struct.unpack(">I", data[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", data[132 + 12 * at : 144 + 12 * at])
        if tag.decode() in columns:
            values = [round(value * 2**16) for value in columns[tag.decode()]]
            data[offset + 8 : offset + 20] = struct.pack(">3i", *values)
    return bytes(data)


def in_srgb(rgb: tuple[int, int, int], columns: dict[str, tuple[float, float, float]]) -> np.ndarray:
    """Convert a colour with sRGB's curve and other primaries by the formulas of IEC 61966-2-1."""
    encoded = np.array(rgb) / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    matrix = lambda columns: np.array(list(columns.values())).T  # noqa: E731
    linear = np.linalg.solve(matrix(SRGB), matrix(columns) @ linear)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


def saved(image: Image.Image, icc: bytes, kind: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, icc_profile=icc)
    return buffer.getvalue()


def test_display_p3_is_converted() -> None:
    colour = (200, 120, 100)
    expected = in_srgb(colour, DISPLAY_P3)
    assert np.abs(expected - colour).max() > 10
    image = decode(saved(Image.new("RGB", (4, 4), colour), profile(DISPLAY_P3)))
    np.testing.assert_allclose(image.getpixel((1, 1)), expected, atol=1)
    assert image.getpixel((1, 1)) == open_image(image).getpixel((1, 1))  # not converted twice


def test_alpha_is_kept_until_it_is_composited() -> None:
    image = Image.new("RGBA", (4, 4), (200, 120, 100, 255))
    image.paste((0, 0, 0, 0), (0, 0, 2, 4))
    image = decode(saved(image, profile(DISPLAY_P3)))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    np.testing.assert_allclose(image.getpixel((3, 0)), in_srgb((200, 120, 100), DISPLAY_P3), atol=1)


@pytest.mark.parametrize(
    ("mode", "icc"),
    [
        ("RGB", SRGB_BYTES),
        ("RGB", b"no profile"),
        ("L", profile(DISPLAY_P3)),  # a profile of another colour space
        ("CMYK", profile(DISPLAY_P3)),
    ],
    ids=["srgb", "damaged", "grey", "cmyk"],
)
def test_what_is_srgb_or_no_profile_of_the_image_is_unchanged(mode: str, icc: bytes) -> None:
    image = Image.new(mode, (4, 4), (200, 120, 100, 10)[: len(Image.new(mode, (1, 1)).getbands())])
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode(saved(image, icc, kind)).getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_rewards_see_images_in_memory_as_those_of_files() -> None:
    shown = Image.open(BytesIO(saved(Image.new("RGB", (4, 4), (200, 120, 100)), profile(DISPLAY_P3))))
    transparent = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    seen = []

    def score(images, prompts):
        seen.extend(image.getpixel((0, 0)) for image in images)
        return torch.zeros(len(prompts))

    in_batches(score, [shown, transparent], ["a", "b"], batch_size=1)
    assert seen == [decode(saved(shown, shown.info["icc_profile"])).getpixel((0, 0)), (255, 255, 255)]
