"""Level words: tiny random models of two classes, whose next words transformers' own forward gives."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from diffalign import rewards
from diffalign.errors import UserError
from tests.rewards import tiny_qwen, tiny_qwen3
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some

WORDS = {"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1}  # DeQA-Score's weights
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    folder = tiny_qwen.make_base(tmp_path_factory.mktemp("qwen2"))
    pixels = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    words = tiny_qwen.make_tokenizer(folder)
    Qwen2VLProcessor(pixels, words, Qwen2VLVideoProcessor(), chat_template=tiny_qwen.CHAT).save_pretrained(
        folder
    )
    tiny_qwen.random_model(folder, std=0.2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = tiny_qwen3.make_base(tmp_path_factory.mktemp("qwen3"))
    tiny_qwen3.save_processor(folder)
    tiny_qwen3.random_model(folder, std=0.2).save_pretrained(folder)
    return folder


@torch.no_grad()
def published(folder, image, about, system=""):
    """Return DeQA-Score's score, 1 to 5, of the logits of one image."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    text = (
        f"{system}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How would you rate the "
        f"{about} of this image?<|im_end|>\n<|im_start|>assistant\nThe {about} of the image is"
    )
    inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
    logits = model(**inputs).logits[0, -1].double().numpy()
    ids = [processor.tokenizer(f" {word}").input_ids[0] for word in WORDS]
    share = np.exp(logits[ids])
    return float(share @ np.array(list(WORDS.values())) / share.sum())


@pytest.mark.parametrize(("about", "option"), [("quality", ""), ("aesthetics", "@about=aesthetics")])
def test_they_are_the_published_formula(qwen2, qwen3, about, option):
    images = pictures(3)
    for folder, system in ((qwen2, SYSTEM), (qwen3, "")):
        found = rewards.load(f"quality_levels:{folder}{option}")(images, ["a", "b", "a much longer prompt"])
        wanted = [published(folder, image, about, system) for image in images]
        np.testing.assert_allclose(1 + 4 * found, wanted, rtol=0, atol=2e-4)
        assert np.ptp(wanted) > 0.05


@covers("quality_levels")
@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_it_keeps_to_what_rewards_keep_to(model, request):
    reward = rewards.load(f"quality_levels:{request.getfixturevalue(model)}")
    spread = reward(pictures(), some(["a"], 6)).std().item()
    conforms(reward, ["a"], tolerance=spread / 5, differentiable=True)


def test_prompts_are_not_read(qwen3):
    reward, image = rewards.load(f"quality_levels:{qwen3}"), pictures(1)[0]
    assert reward([image], [""]).item() == reward([image], ["<|image_pad|> anything"]).item()
    assert not rewards.REGISTRY["quality_levels"].reads_prompt


def test_bfloat16(qwen2):
    assert_bfloat16_keeps_the_order(f"quality_levels:{qwen2}", ["a"], 0.8)


def test_other_models_and_options_are_refused(qwen2, tmp_path):
    with pytest.raises(UserError, match="cannot load the vision-language model of 'Qwen/"):
        rewards.load("quality_levels")
    with pytest.raises(UserError, match="option about of the reward 'quality_levels': 'speed'"):
        rewards.load(f"quality_levels:{qwen2}@about=speed")
    for file in qwen2.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="cannot load the chat template of"):
        rewards.load(f"quality_levels:{tmp_path}")


def test_words_that_begin_alike_are_refused(qwen2, monkeypatch):
    monkeypatch.setattr("diffalign.rewards.zoo.quality_levels.LEVELS", {"good": 1.0, "goods": 0.0})
    with pytest.raises(UserError, match="begins two of good, goods with one token"):
        rewards.load(f"quality_levels:{qwen2}")
