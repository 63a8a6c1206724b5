"""Image files to RGB: an allow-list of formats, and greys deeper than eight bits."""

import ast
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

import diffalign
from diffalign.media.images import UNREADABLE, decode, has_further_frames, note_on_frames, why_unreadable

GREY = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (8, 1))

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
0 0 8 8 rectfill
showpage
"""


def saved(image: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (GREY.astype(np.uint16) * 257, "PNG"),
        (GREY.astype(np.uint16) * 257, "TIFF"),
        (GREY.astype(np.int32) * 257, "TIFF"),
        (GREY.astype(np.int32), "TIFF"),
        ((GREY / 255).astype(np.float32), "TIFF"),
        (GREY.astype(np.float32), "TIFF"),
        (GREY.astype(np.float32) * 257, "TIFF"),
    ],
    ids=["16-bit png", "16-bit tiff", "16 bits in 32", "8 bits in 32", "0 to 1", "0 to 255", "0 to 65535"],
)
def test_deep_greys_are_the_eight_bit_ones(values, kind):
    image = decode(saved(Image.fromarray(values), kind))
    assert image.mode == "RGB"
    for channel in np.moveaxis(np.asarray(image), -1, 0):
        np.testing.assert_array_equal(channel, GREY)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e12])
def test_greys_of_no_pictures_range_are_unreadable(value):
    values = (GREY / 255).astype(np.float32)
    values[0, 0] = value
    with pytest.raises(ValueError, match="grey values"):
        decode(saved(Image.fromarray(values), "TIFF"))


def test_eps_starts_no_other_program(monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append("gs"))
    with pytest.raises(UNREADABLE) as caught:
        decode(EPS)
    assert not started and "PNG, JPEG" in why_unreadable(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats_that_people_have(kind):
    image = Image.new("RGB", (16, 16), (200, 40, 40))
    pixels = np.asarray(decode(saved(image, kind)), dtype=int)
    assert np.abs(pixels - [200, 40, 40]).max() <= 12


def test_every_image_is_opened_with_an_allow_list():
    for path in Path(diffalign.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert any(keyword.arg == "formats" for keyword in node.keywords), path


@pytest.mark.parametrize(
    ("kind", "several"),
    [("GIF", True), ("WEBP", True), ("PNG", True), ("TIFF", True), ("MPO", False)],  # MPO: a phone's JPEG
)
def test_the_first_frame_of_several_is_read_and_told(kind: str, several: bool) -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (255, 128, 0)]
    one, three = BytesIO(), BytesIO()
    frames[0].save(one, "JPEG" if kind == "MPO" else kind)
    frames[0].save(three, kind, save_all=True, append_images=frames[1:])
    assert not has_further_frames(one.getvalue())
    assert has_further_frames(three.getvalue()) == several
    assert decode(three.getvalue()).getpixel((8, 8))[0] > 250


def test_the_note_on_frames_has_their_number_and_an_example() -> None:
    assert note_on_frames([]) == ""
    assert note_on_frames(["a.gif"]).startswith("1 image file has several frames")
    note = note_on_frames(["a.gif", "b.png"])
    assert note.startswith("2 image files have several frames") and note.endswith("such as a.gif")
