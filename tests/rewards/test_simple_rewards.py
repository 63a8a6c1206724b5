"""The registry, the judges and the JPEG sizes."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.registry import parse
from diffalign.tiny import judge as judges
from diffalign.tiny import scenes


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    captions = list(scenes.split_captions("test")[:6])
    return [scenes.render(scenes.scene_of(c, random)) for c in captions], captions


def test_listing_rewards_imports_no_torch():
    code = "import sys, diffalign.rewards as r;"
    code += "print('torch' in sys.modules, 'numpy' in sys.modules, len(r.REGISTRY))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", str(len(rewards.REGISTRY))]


def test_cards_are_complete():
    assert {"judge", "taste", "tiny_clip", "pickscore", "jpeg", "aesthetic_v1", "aesthetic_v2"} <= set(
        rewards.REGISTRY
    )
    for name, card in rewards.REGISTRY.items():
        assert card.name == name
        assert card.title and card.range and card.licence and card.size and card.notes and ":" in card.target


def test_specs():
    assert parse("jpeg") == (rewards.REGISTRY["jpeg"], None)
    assert parse("pickscore:a/b") == (rewards.REGISTRY["pickscore"], "a/b")


@pytest.mark.parametrize(
    ("spec", "options", "words"),
    [
        ("pikscore", {}, ["pikscore", "did you mean pickscore"]),
        ("pickscore:", {}, ["nothing after the colon"]),
        ("jpeg:file", {}, ["'file'", "write 'jpeg'"]),
        ("judge:x", {}, ["no weights"]),
        ("jpeg", {"dtype": "int8"}, ["int8", "float32"]),
        ("jpeg", {"batch_size": 0}, ["batch_size is 0"]),
        ("jpeg", {"device": "gpu"}, ["device 'gpu' is not available here; allowed: auto, cpu"]),
        ("jpeg", {"device": "cuda:99"}, ["device 'cuda:99' is not available here"]),
        (None, {}, ["reward None is a NoneType; allowed: a text, such as 'pickscore'"]),
    ],
)
def test_bad_specs(spec, options, words):
    with pytest.raises(UserError) as error:
        rewards.load(spec, **options)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["judge", "taste"])
def test_judges_are_the_rules_themselves(drawn, name):
    images, captions = drawn
    scores = rewards.load(name, batch_size=4)(images, captions)
    rule = getattr(judges, name)
    assert scores.shape == (6,) and scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([rule(i, c) for i, c in zip(images, captions, strict=True)])


def test_true_scenes_are_right_and_swapped_ones_are_not(drawn):
    images, captions = drawn
    judge = rewards.load("judge")
    assert judge(images, captions).mean() > judge(images, captions[::-1]).mean() + 0.2


def test_pixels_score_as_the_image_they_are(drawn):
    images, captions = drawn
    pixels = torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) for i in images]).float() / 255
    for name in ("judge", "taste", "jpeg"):
        reward = rewards.load(name)
        assert torch.equal(reward(pixels, captions), reward(images, captions))
        assert reward(pixels[:1], captions[:1]).shape == (1,)


def test_a_caption_that_is_no_scene_is_named(drawn):
    with pytest.raises(UserError, match="an astronaut riding a horse"):
        rewards.load("judge")(drawn[0][:1], ["an astronaut riding a horse"])


def test_counts_and_shapes_must_fit(drawn):
    jpeg = rewards.load("jpeg")
    with pytest.raises(ValueError, match="6 images but 1 prompts"):
        jpeg(drawn[0], ["x"])
    with pytest.raises(ValueError, match="B, 3, H, W"):
        jpeg(torch.zeros(1, 4, 8, 8), ["x"])
    with pytest.raises(ValueError, match="float"):
        jpeg(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["x"])


def test_jpeg_sizes():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (512, 512), "white"), Image.fromarray(noise)]
    small, large = rewards.load("jpeg"), rewards.load("jpeg_incompressibility")
    scores = large(images, ["", "", ""])
    # with Pillow 13.0 and libjpeg-turbo 3.2; others differ a little
    assert scores.tolist() == pytest.approx([0.691, 4.723, 5.427], rel=0.01)
    buffer = io.BytesIO()
    images[2].save(buffer, "JPEG", quality=95)
    assert scores[2].item() == pytest.approx(len(buffer.getvalue()) / 1000)
    assert torch.equal(small(images, ["", "", ""]), -scores)


def test_the_tiny_clip_prefers_true_captions():
    clip = pytest.importorskip("diffalign.tiny").clip_path()
    if not (clip / "model.safetensors").is_file():
        pytest.skip("the tiny CLIP has not been built")
    random = np.random.default_rng(1)
    captions = list(scenes.split_captions("test")[:64])
    images = [scenes.render(scenes.scene_of(c, random)) for c in captions]
    reward = rewards.load("tiny_clip")
    right, wrong = reward(images, captions), reward(images, captions[1:] + captions[:1])
    assert (right > wrong).float().mean() > 0.8


@pytest.mark.parametrize(
    ("images", "prompts", "words"),
    [
        (
            [Image.new("RGB", (8, 8))] * 2,
            "ab",
            r"prompts is the text 'ab'; allowed: a list of one prompt per",
        ),
        (Image.new("RGB", (8, 8)), ["a"], "images is one PIL image; allowed: a list"),
        (np.zeros((1, 8, 8, 3), np.uint8), ["a"], "images holds a ndarray; allowed: PIL images"),
        (["a.png"], ["a"], "images holds a str; allowed: PIL images"),
        (torch.full((1, 3, 8, 8), -1.0), ["a"], r"pixels are from -1 to -1; allowed: \[0, 1\]"),
        (torch.full((1, 3, 8, 8), 255.0, requires_grad=True), ["a"], r"from 255 to 255.*bytes: x / 255"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: object, prompts: object, words: str) -> None:
    """Each of them was scored, or failed within the reward, without a word of what is wrong."""
    with pytest.raises(ValueError, match=words):
        rewards.load("jpeg")(images, prompts)  # type: ignore[arg-type]


def test_images_may_come_from_a_generator() -> None:
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    jpeg = rewards.load("jpeg")
    assert torch.equal(jpeg((p for p in pictures), ["a", "b"]), jpeg(pictures, ["a", "b"]))
