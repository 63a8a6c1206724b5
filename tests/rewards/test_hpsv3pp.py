"""HPSv3++: a tiny random checkpoint in the published layout, and transformers' own classes beside it."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import erf
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.hpsv3pp import instruction_of_quality
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.rewards.tiny_qwen import WIDTH, marked
from tests.rewards.tiny_qwen3 import CHAT, image_processor, make_base, random_model

MARK = "<|Reward|>"
FULL = 256 * 28 * 28
COND = 12
PROMPTS = ["a red cat", "{text_prompt} in <b>braces</b>, and a prompt that is far longer than the others"]
SHAPES = {
    "rm_head.0": (24, WIDTH), "rm_head.3": (16, 24), "rm_head.5": (2, 16), "cond_encoder.0": (COND, 2),
    "cond_encoder.2": (COND, COND), "film_gen.0": (WIDTH, COND), "film_gen.2": (2 * WIDTH, WIDTH),
    "cap_encoder.proj": (COND, WIDTH), "cap_encoder.pool_attn": (1, COND), "cap_encoder.out_proj": (1, COND),
}  # fmt: skip


def head_state(seed=1):
    """Weights by the names of the file."""
    generator = torch.Generator().manual_seed(seed)
    state = {f"{name}.weight": torch.randn(s, generator=generator) / 4 for name, s in SHAPES.items()}
    return state | {f"{name}.bias": torch.randn(s[0], generator=generator) for name, s in SHAPES.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def words(base):
    tokenizer = marked(base, [MARK])
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def model(base, words):
    return random_model(base, len(words))


@pytest.fixture(scope="module")
def spec(base, model, tmp_path_factory):
    file = tmp_path_factory.mktemp("hpsv3pp") / "hpsv3++.pth"
    torch.save({"model": dict(model.state_dict()) | head_state()}, file)
    return f"hpsv3pp:{file}@{base}"


@pytest.fixture(scope="module")
def reward(spec):
    return rewards.load(spec)


@torch.no_grad()
def hidden_state(model, words, image, prompt):
    """Return the state at the mark of one image, (D,), by transformers' own processor and model."""
    height, width = smart_resize(image.height, image.width, 28, FULL, FULL)
    small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    cut = image_processor()(small, return_tensors="pt")
    text = instruction_of_quality().format(text_prompt=prompt)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    whole = words.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    count = int(cut.image_grid_thw.prod()) // 4
    ids = words(whole.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt").input_ids
    states = model.model(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=cut.pixel_values,
        image_grid_thw=cut.image_grid_thw, mm_token_type_ids=(ids == model.config.image_token_id).int(),
    ).last_hidden_state  # fmt: skip
    (at,) = (ids[0] == words.convert_tokens_to_ids(MARK)).nonzero()
    return states[0, at[0]].numpy().astype(np.float64)


def published(state, iteration):
    """Return capability, mean and spread of one state, in numpy."""
    weights = {key: tensor.double().numpy() for key, tensor in head_state().items()}

    def layer(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    group = layer("cap_encoder.proj", state)[None]  # the images of a call: one
    share = np.exp(group @ weights["cap_encoder.pool_attn.weight"].T + weights["cap_encoder.pool_attn.bias"])
    pooled = (group * share / share.sum(0)).sum(0)
    capability = 1 / (1 + np.exp(-layer("cap_encoder.out_proj", pooled)))
    x = layer("cond_encoder.0", np.array([*capability, iteration]))
    x = layer("cond_encoder.2", x * (1 + erf(x / 2**0.5)) / 2)
    film = layer("film_gen.2", np.maximum(layer("film_gen.0", x), 0))
    x = state * (1 + film[:WIDTH]) + film[WIDTH:]
    x = np.maximum(layer("rm_head.3", np.maximum(layer("rm_head.0", x), 0)), 0)
    return capability[0], *layer("rm_head.5", x)


@pytest.mark.parametrize("iteration", [0.0, 0.65])
def test_it_is_the_published_formula(spec, model, words, iteration):
    images = [*pictures(3), Image.effect_noise((768, 768), 90)]  # the last is resized twice: 420, then 416
    prompts = some(PROMPTS, 4)
    scores = rewards.load(f"{spec}@iteration={iteration}" if iteration else spec)(images, prompts)
    states = [hidden_state(model, words, i, p) for i, p in zip(images, prompts, strict=True)]
    wanted = np.array([published(state, iteration) for state in states])
    np.testing.assert_allclose(scores, wanted[:, 1], rtol=0, atol=1e-4)
    assert np.abs(wanted[:, 1] - wanted[:, 2]).min() > 0.01  # the spread is something else
    assert np.ptp(wanted[:, 0]) > 0.01  # images differ in capability
    assert abs(published(states[0], iteration + 0.3)[1] - wanted[0, 1]) > 0.01  # and the iteration matters


@covers("hpsv3pp")
def test_it_keeps_to_what_rewards_keep_to(reward):
    spread = reward(pictures(), some(PROMPTS, 6)).std().item()
    conforms(reward, PROMPTS, tolerance=spread / 5, differentiable=True)


def test_bfloat16(spec):
    assert_bfloat16_keeps_the_order(spec, PROMPTS, 0.85)


def test_the_instruction_is_the_published_one():
    """Digest of INSTRUCTION + prompt_with_special_token in the repository's data_collator_qwen.py."""
    digest = hashlib.sha256(instruction_of_quality().encode()).hexdigest()
    assert digest == "5e6fde2238a332ebdfdef60128d3ded626450a694897f2c963e6b44cd80fe3c8"


def test_the_prompt_is_read(reward):
    first, second = reward([pictures(1)[0]] * 2, ["a red cat", "a blue dog"])
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("a cat <|Reward|>", r"reward 'hpsv3pp': the prompt 'a cat <\|Reward\|>' holds '<\|Reward\|>'"),
        ("", "reward 'hpsv3pp': an empty prompt"),
    ],
)
def test_prompts_it_cannot_read(reward, prompt, reason):
    with pytest.raises(UserError, match=reason):
        reward(pictures(2), ["a cat", prompt])


def test_other_files_are_refused(model, base, spec, tmp_path):
    with pytest.raises(UserError, match=r"there is no file '/nowhere/hpsv3.pth'"):
        rewards.load("hpsv3pp:/nowhere/hpsv3.pth")
    with pytest.raises(UserError, match=r"cannot fetch hpsv3\+\+.pth of Junjun2333/HPSv3-PlusPlus"):
        rewards.load("hpsv3pp")
    file = tmp_path / "plain.pth"
    without = {key: value for key, value in head_state().items() if not key.startswith("film_gen.0")}
    torch.save(dict(model.state_dict()) | without, file)
    with pytest.raises(UserError, match=r"has no layer film_gen.0; it is no HPSv3\+\+"):
        rewards.load(f"hpsv3pp:{file}@{base}")
    torch.save(dict(model.state_dict()) | head_state() | {"rm_head.0.weight": torch.zeros(24, 5)}, file)
    with pytest.raises(UserError, match=r"takes 5 numbers, but its language model makes 32"):
        rewards.load(f"hpsv3pp:{file}@{base}")
    for iteration in ("1.5", "-0.1"):
        with pytest.raises(UserError, match=rf"iteration={iteration}; allowed: 0 .* to 1"):
            rewards.load(f"{spec}@iteration={iteration}")
