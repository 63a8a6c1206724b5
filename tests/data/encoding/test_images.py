import math
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.config.schema import DataConfig
from diffalign.data.encoding.geometry import MAX_RATIO, Cut, bucket_of, buckets, cuts
from diffalign.data.encoding.images import cut_out, image_size, to_unit
from diffalign.media.images import UNREADABLE, decode
from tests.data.conftest import picture, png


def content_of(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# where the crop lies


def test_a_pair_shares_the_target_and_the_relative_crop():
    config = DataConfig(resolution=64, crop="random")
    for content in map(str, range(20)):
        first, second = cuts([(64, 128), (200, 400)], config, content)
        assert first.target == second.target == (64, 64)
        assert first.original == (64, 128) and second.original == (200, 400)
        assert first.resized == second.resized == (64, 128)  # the same aspect: the same place to the pixel
        assert first.corner == second.corner
        wide, tall = cuts([(64, 128), (128, 64)], config, content)
        assert wide.corner[0] == 0 and tall.corner[1] == 0
    assert len({cuts([(64, 128)], config, str(i))[0].corner for i in range(20)}) > 5
    assert cuts([(64, 128)], config, "x") == cuts([(64, 128)], config, "x")


def test_the_centre_crop_covers_the_target_with_the_shorter_side():
    (cut,) = cuts([(300, 600)], DataConfig(resolution=64), "")
    assert cut == Cut((300, 600), (64, 128), (0, 32), (64, 64))
    assert Cut((1, 1), (64, 100), (0, 10), (64, 64)).mirrored_corner == (0, 26)


@pytest.mark.parametrize(
    ("resolution", "step"), [(1024, 64), (512, 64), (768, 64), (32, 8), (64, 48), (8, 8)]
)
def test_buckets(resolution, step):
    found = buckets(resolution, step)
    for height, width in found:
        assert height % step == width % step == 0
        assert resolution**2 / 3 < height * width <= resolution**2
        assert 1 / MAX_RATIO <= height / width <= MAX_RATIO
        assert (width, height) in found
    if resolution % step == 0:
        assert (resolution, resolution) in found
    if resolution == 1024:  # the areas that SDXL was trained on
        assert {(704, 1408), (768, 1344), (832, 1216), (896, 1152)} < set(found)


def test_a_pair_goes_to_the_bucket_of_its_mean_log_aspect():
    config = DataConfig(resolution=1024, buckets=True)
    assert bucket_of([(100, 200), (200, 100)], config) == (1024, 1024)
    assert bucket_of([(768, 1344), (1536, 2688)], config) == (768, 1344)
    aspect = math.sqrt((600 / 800) * (500 / 900))
    height, width = bucket_of([(600, 800), (500, 900)], config)
    nearest = min(buckets(1024, 64), key=lambda size: abs(math.log(size[0] / size[1] / aspect)))
    assert (height, width) == nearest
    for cut in cuts([(600, 800), (500, 900)], config, ""):
        assert cut.target == nearest and all(r >= t for r, t in zip(cut.resized, cut.target, strict=True))


# pixels


def test_cutting_without_resizing_takes_the_very_pixels():
    image = picture(0, width=24, height=16)
    pixels = cut_out(image, Cut((16, 24), (16, 24), (0, 3), (16, 16)))
    assert torch.equal(pixels, torch.from_numpy(np.array(image))[:, 3:19].permute(2, 0, 1))
    assert to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = cut_out(Image.fromarray(stripes), Cut((64, 64), (16, 16), (0, 0), (16, 16))).float()
    assert (pixels - 127.5).abs().max() < 20  # aliasing would leave 0 or 255


def test_mirrored_corner_is_the_crop_of_the_mirrored_image():
    image = picture(1, width=30, height=16)
    cut = Cut((16, 30), (16, 30), (0, 3), (16, 16))
    mirrored = Cut((16, 30), (16, 30), cut.mirrored_corner, (16, 16))
    turned = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(cut_out(image, cut).flip(-1), cut_out(turned, mirrored))


def test_exif_orientation():
    image = picture(2, width=24, height=16)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise for display
    content = content_of(image, exif=exif)
    assert image_size(content) == (24, 16)
    assert np.array_equal(np.asarray(decode(content)), np.rot90(np.asarray(image), -1))
    assert image_size(png(0, width=24, height=16)) == (16, 24)


def test_every_mode_becomes_rgb():
    grey = Image.fromarray(np.full((8, 8), 100, dtype=np.uint8))
    deep = Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16))
    for image in (grey, deep, grey.convert("P"), grey.convert("RGB"), grey.convert("LA")):
        assert np.asarray(decode(content_of(image))).tolist() == np.full((8, 8, 3), 100).tolist(), image.mode
    cmyk = decode(content_of(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert cmyk.mode == "RGB" and np.asarray(cmyk).min() >= 254


def test_transparency_is_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    palette = Image.new("P", (8, 8), 0)
    assert np.asarray(decode(content_of(clear))).min() == 255
    assert np.asarray(decode(content_of(half))).tolist() == np.full((8, 8, 3), 127).tolist()
    assert np.asarray(decode(content_of(palette, transparency=0))).min() == 255


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_unreadable(format):
    content = content_of(picture(3, 64, 64), format)
    with pytest.raises(UNREADABLE):
        decode(content[: len(content) // 2])


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_unreadable(content):
    with pytest.raises(UNREADABLE):
        image_size(content)
    with pytest.raises(UNREADABLE):
        decode(content)
