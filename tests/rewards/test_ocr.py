"""The quoted text and how much of it is read; the reader itself where it is installed."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.ocr import Ocr, agreement, levenshtein, quoted
from tests.rewards import conformance
from tests.rewards.conformance import covers


@dataclass(frozen=True)
class Reads:
    """A recogniser that reads the more the brighter an image is."""

    def __call__(self, image):
        assert image.mode == "RGB"
        return ["x" * int(np.asarray(image).mean() / 10)]


def test_the_first_pair_of_quotes():
    assert quoted('A sign that says "Open 24 Hours", and "never" below') == "open24hours"
    assert quoted("it's \"It's\"") == "it's"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a sign", "no text between straight double quotes in the prompt 'a sign'"),
        ('a 5" sign', "no text between"),
        ("a “sign”", "no text between"),
        ('a "" sign with "words"', "nothing between the first quotes"),
        ('a " " sign', "nothing between the first quotes"),
    ],
)
def test_prompts_without_a_text(prompt, message):
    reward = Ocr(Reads())
    with pytest.raises(UserError, match=message):
        reward([Image.new("RGB", (8, 8))] * 2, ['"fine"', prompt])


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_levenshtein(one, other, distance):
    assert levenshtein(one, other) == levenshtein(other, one) == distance


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["We are", "OPEN 24", "hours a day"], 1.0),  # across lines, among other text
        (["Open 24 hour"], 10 / 11),
        (["0pen 24 h0urs"], 9 / 11),
        ([], 0.0),
        (["something else that is much longer than the text"], 0.0),  # capped: not below 0
    ],
)
def test_agreement(lines, expected):
    assert agreement("open24hours", lines) == pytest.approx(expected)


@covers("ocr")
def test_it_conforms():
    conformance.conforms(
        Ocr(Reads()), [f'a "{"x" * 30}"', f'a "x y {"x" * 25}"'], tolerance=1e-6, differentiable=False
    )


def test_real_letters():
    """Text drawn with Pillow, read back."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    font = ImageFont.load_default(40)
    images = []
    for text, colour in [("Hello World", "black"), ("open 24 h", "navy"), ("", "black")]:
        image = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(image).text((15, 100), text, fill=colour, font=font)
        images.append(image)
    reward = rewards.load("ocr")
    prompt = 'A poster with the words "Hello World"'
    scores = reward(images, [prompt, 'a door with "Open 24 H" on it', prompt])
    assert scores.dtype == torch.float32 and scores.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_said(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install \"diffalign\[ocr\]\""):
        rewards.load("ocr")


def test_it_takes_no_source():
    with pytest.raises(UserError, match="write 'ocr'"):
        rewards.load("ocr:english")
