"""Letterbox and Stretch against torchvision and transformers, and all three on photographs."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD, Crop, Letterbox, Stretch
from tests.helpers import PUBLISHED_DATA
from tests.rewards.conformance import as_pixels, pictures

PHOTOS = PUBLISHED_DATA / "laion_aesthetic_v1"
SHAPES = [(40, 30), (28, 28), (14, 28), (64, 64), (31, 90), (57, 33), (45, 100), (300, 1), (10, 8)]


def grainy(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(width * height)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_letterbox_is_torchvisions_resize_pad_and_normalize(shape):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = grainy(*shape)
    x = functional.to_tensor(image)
    longest = max(shape)
    new = [max(1, round(side * (28 / float(longest)))) for side in (image.height, image.width)]
    if longest != 28:
        x = functional.resize(x, new, functional.InterpolationMode.BICUBIC, antialias=True)
    high, wide = 28 - new[0], 28 - new[1]
    x = functional.pad(x, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=0)
    wanted = functional.normalize(x, OPENAI_MEAN, OPENAI_STD)[None]
    torch.testing.assert_close(Letterbox(28)([image]), wanted, rtol=0, atol=1e-6)
    assert torch.equal(Letterbox(28)(as_pixels(image)), Letterbox(28)([image]))


def test_letterbox_bars_are_black_and_the_odd_line_is_at_the_end():
    white = Image.new("RGB", (100, 45), "white")  # round(45 x 0.28) = round(12.6) = 13: 15 lines of bars
    square = Letterbox(28).pil([white])[0]
    assert not square[:, :7].any() and not square[:, 20:].any()
    torch.testing.assert_close(square[:, 7:20], torch.ones(3, 13, 28), rtol=0, atol=1e-6)
    bar = Letterbox(28)([white])[0, :, 0, 0]
    torch.testing.assert_close(bar, -torch.tensor(OPENAI_MEAN) / torch.tensor(OPENAI_STD))


@pytest.mark.parametrize(
    ("width", "height", "lines"),
    [
        (56, 25, 12),  # 25 x (28 / 56) = 12.5: to the even one, as Python rounds
        (56, 27, 14),  # 13.5
        (200, 75, 11),  # 75 x (28 / 200) is a little more than 10.5 in float64
    ],
)
def test_letterbox_rounds_as_the_published_code(width, height, lines):
    image = Image.new("RGB", (width, height), "white")
    assert (Letterbox(28).pil([image])[0, 0, :, 0] > 0.5).sum() == lines


def test_a_letterboxed_square_is_only_resized():
    image = grainy(64, 64)
    wanted = torch.nn.functional.interpolate(as_pixels(image), (28, 28), mode="bicubic", antialias=True)
    assert torch.equal(Letterbox(28).pil([image]), wanted)


def test_without_antialiasing_letterbox_reads_sixteen_pixels_for_one():
    """Bicubic weights (a = -0.75) of the four nearest pixels on each axis, written out."""
    image = grainy(56, 56)
    distance = np.array([1.5, 0.5, 0.5, 1.5])  # at a factor of two samples lie between the pixels
    a, near = -0.75, distance <= 1
    weight = np.where(
        near,
        (a + 2) * distance**3 - (a + 3) * distance**2 + 1,
        a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a,
    )
    x = as_pixels(image)[0].double().numpy()
    patch = x[:, 2 * 13 - 1 : 2 * 13 + 3, 2 * 9 - 1 : 2 * 9 + 3]
    wanted = np.einsum("chw,h,w->c", patch, weight, weight)
    found = Letterbox(28, antialias=False).pil([image])[0, :, 13, 9]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(Letterbox(28).pil([image])[0, :, 13, 9].numpy() - wanted).max() > 0.01


def test_stretch_is_the_processors_to_the_bit():
    images = [image.convert("RGB") for image in pictures()]
    processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    wanted = processor(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(Stretch(28)(pictures()), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_stretched_pixels_are_the_image_but_for_rounding(shape):
    image = grainy(*shape).point(lambda level: 64 + level // 2)  # so that nothing overshoots
    exact, smooth = Stretch(28).pil([image]), Stretch(28).pixels(as_pixels(image))
    assert exact.shape == smooth.shape == (1, 3, 28, 28)
    assert (exact - smooth).abs().max() < 0.005  # half a grey level is 0.002, and Pillow rounds each axis


@pytest.mark.parametrize("how", [Crop, Letterbox, partial(Letterbox, antialias=False), Stretch])
def test_pixels_get_gradients_and_half_precision_is_resized_in_float32(how):
    pixels = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    squares = how(28)(pixels)
    squares.square().sum().backward()
    assert squares.dtype == torch.float32 and pixels.grad.isfinite().all() and pixels.grad.any()
    assert how(28)(pixels.detach().bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("how", [Crop, Stretch])
def test_paths_differ_on_photographs_as_little_as_stated(how):
    """In normalised units, at 224: on average 0.002, and 0.15 where Pillow clamps an edge after each axis."""
    photos = sorted(path for path in PHOTOS.rglob("*") if path.suffix in (".jpg", ".png", ".webp"))
    assert photos
    for photo in photos:
        image = Image.open(photo).convert("RGB")
        both = how(224)([image]), how(224)(as_pixels(image))
        difference = (both[0] - both[1]).abs()
        assert difference.mean() < 0.0025 and difference.max() < 0.15, (photo.name, difference.mean())
