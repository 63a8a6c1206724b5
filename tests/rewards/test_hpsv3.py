"""HPSv3: a tiny random checkpoint in the published layout, and transformers' own classes beside it."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.instructions import template
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.rewards.tiny_qwen import (
    WIDTH,
    hidden_states,
    image_processor,
    make_base,
    marked,
    old_layout,
    random_model,
)

MARK = "<|Reward|>"
FULL = 256 * 28 * 28
PROMPTS = ["a red cat", "{text_prompt} in <b>braces</b>, and a prompt that is far longer than the others"]


def head_state(seed=0):
    """Weights by the names of the file, in float32 as there."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {0: (24, WIDTH), 3: (16, 24), 5: (2, 16)}
    state = {f"rm_head.{i}.weight": torch.randn(s, generator=generator) / 4 for i, s in sizes.items()}
    return state | {f"rm_head.{i}.bias": torch.randn(s[0], generator=generator) for i, s in sizes.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def words(base):
    return marked(base, [MARK])


@pytest.fixture(scope="module")
def model(base, words):
    return random_model(base, len(words))


@pytest.fixture(scope="module")
def spec(base, model, tmp_path_factory):
    file = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    save_file(old_layout(model) | head_state(), file)
    return f"hpsv3:{file}@{base}"


@pytest.fixture(scope="module")
def reward(spec):
    return rewards.load(spec)


def published(model, words, image, prompt):
    """Return mean and spread by the formula of the released code, on transformers' processor and model."""
    height, width = smart_resize(image.height, image.width, 28, FULL, FULL)
    small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    inputs = image_processor()(small, return_tensors="pt")
    text = template("hpsv3").format(text_prompt=prompt)
    ids, states = hidden_states(model, words, text, "image", inputs.pixel_values, inputs.image_grid_thw)
    assert (ids == words.convert_tokens_to_ids(MARK)).sum() == 1
    x, head = states[ids == words.convert_tokens_to_ids(MARK)], head_state()
    for layer in (0, 3, 5):
        x = F.linear(x.relu() if layer else x, head[f"rm_head.{layer}.weight"], head[f"rm_head.{layer}.bias"])
    return x[0]


def test_it_is_the_published_formula(reward, model, words):
    images = pictures(3)
    prompts = some(PROMPTS, 3)
    scores = reward(images, prompts)
    wanted = torch.stack([published(model, words, i, p) for i, p in zip(images, prompts, strict=True)])
    torch.testing.assert_close(scores, wanted[:, 0], rtol=0, atol=5e-5)
    assert (wanted[:, 0] - wanted[:, 1]).abs().min() > 0.01  # the spread is something else


@covers("hpsv3")
def test_it_keeps_to_what_rewards_keep_to(reward):
    conforms(reward, PROMPTS, tolerance=0.01, differentiable=True)


def test_bfloat16(spec):
    assert_bfloat16_keeps_the_order(spec, PROMPTS, 0.9)


def test_the_new_layout_scores_alike(reward, model, base, tmp_path):
    save_file(dict(model.state_dict()) | head_state(), tmp_path / "new.safetensors")
    again = rewards.load(f"hpsv3:{tmp_path / 'new.safetensors'}@{base}")
    images = pictures(2)
    assert torch.equal(again(images, PROMPTS), reward(images, PROMPTS))


def test_the_prompt_is_read(reward):
    first, second = reward([pictures(1)[0]] * 2, ["a red cat", "a blue dog"])
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a cat <|Reward|>", r"reward 'hpsv3': the prompt 'a cat <\|Reward\|>' holds '<\|Reward\|>'"),
        ("", "reward 'hpsv3': an empty prompt"),
    ],
)
def test_prompts_it_cannot_read(reward, prompt, reason):
    with pytest.raises(UserError, match=reason):
        reward(pictures(2), ["a cat", prompt])


def test_images_it_cannot_read(reward):
    with pytest.raises(UserError, match="one side is more than 200 times the other"):
        reward([Image.new("RGB", (300, 1))], ["a line"])


def test_other_files_are_refused(model, base, tmp_path):
    with pytest.raises(UserError, match=r"there is no file '/nowhere/HPSv3.safetensors'"):
        rewards.load("hpsv3:/nowhere/HPSv3.safetensors")
    with pytest.raises(UserError, match=r"cannot fetch HPSv3.safetensors of MizzenAI/HPSv3"):
        rewards.load("hpsv3")
    file = tmp_path / "plain.safetensors"
    save_file(old_layout(model), file)
    with pytest.raises(UserError, match=r"has no head of HPSv3's three layers.*it has none"):
        rewards.load(f"hpsv3:{file}@{base}")
    save_file(old_layout(model) | head_state() | {"rm_head.0.weight": torch.zeros(24, 5)}, file)
    with pytest.raises(UserError, match=r"takes 5 numbers, but its language model makes 32"):
        rewards.load(f"hpsv3:{file}@{base}")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(UserError, match="is not a checkpoint of plain tensors"):
        rewards.load(f"hpsv3:{broken}@{base}")
