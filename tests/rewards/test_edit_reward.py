"""EditReward: a tiny random Qwen2.5-VL in the published layout, and transformers' own classes beside it."""

import hashlib
import io
import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.zoo.instructions import template
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.rewards.tiny_qwen import CHAT, WIDTH, flat_config, image_processor, make_tokenizer, marked

MARK = "<|Reward|>"
FULL = 256 * 28 * 28
SHAPES = {0: (24, WIDTH), 3: (16, 24), 5: (2, 16)}
MIMO = CHAT.replace("You are a helpful assistant.", "You are MiMo, an AI assistant.")


def edit(text, number=0):
    """Return a prompt with one of some source images."""
    buffer = io.BytesIO()
    pictures(6, seed=7)[number].convert("RGB").save(buffer, "PNG")
    return SourcedPrompt(text, buffer.getvalue())


PROMPTS = [edit("make it red"), edit("{text_prompt}, in a prompt that is far longer than the others", 1)]


def head_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for head in range(2):
        for layer, shape in SHAPES.items():
            state[f"rm_heads.head_{head}.{layer}.weight"] = torch.randn(shape, generator=generator) / 4
            state[f"rm_heads.head_{head}.{layer}.bias"] = torch.randn(shape[0], generator=generator)
    return state


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a folder with the config.json of a Qwen2.5-VL and its tokenizer with the chat template."""
    folder = tmp_path_factory.mktemp("base")
    words = make_tokenizer(folder)
    words.chat_template = CHAT
    words.save_pretrained(folder)
    config = flat_config(words) | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
        "vision_config": {
            "depth": 2, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": 2,
            "intermediate_size": 2 * WIDTH, "in_chans": 3, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "window_size": 56, "fullatt_block_indexes": [1], "hidden_act": "silu",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def words(base):
    return marked(base, [MARK])


@pytest.fixture(scope="module")
def model(base, words):
    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(words)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Qwen2_5_VLForConditionalGeneration(config)
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0 if "embed_tokens" in name else 0.15)
            elif "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    there = tmp_path_factory.mktemp("edit_reward")
    save_file(dict(model.state_dict()) | head_state(), there / "model.safetensors")
    return there


@pytest.fixture(scope="module")
def spec(base, folder):
    return f"edit_reward:{folder}@{base}"


@pytest.fixture(scope="module")
def reward(spec):
    return rewards.load(spec)


@torch.no_grad()
def published(model, words, image, prompt, chat=CHAT):
    """Return the mean score as the released code has it: embeddings, and positions left to the model."""
    small = []
    for one in (prompt.image, image):
        height, width = smart_resize(one.height, one.width, 28, FULL, FULL)
        small.append(one.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
    cut = image_processor()(small, return_tensors="pt")
    counts = (cut.image_grid_thw.prod(1) // 4).tolist()
    means = []
    for head, question in enumerate(("following", "quality")):
        text = template(f"edit_reward_{question}").format(text_prompt=str(prompt))
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": text}]
        whole = words.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=chat, tokenize=False,
            add_generation_prompt=True,
        )  # fmt: skip
        first, second, rest = whole.split("<|image_pad|>")
        whole = first + "<|image_pad|>" * counts[0] + second + "<|image_pad|>" * counts[1] + rest
        ids = words(whole, return_tensors="pt").input_ids
        embedded = model.get_input_embeddings()(ids)
        seen = torch.cat(model.get_image_features(cut.pixel_values, cut.image_grid_thw).pooler_output)
        embedded[ids == words.convert_tokens_to_ids("<|image_pad|>")] = seen
        model.model.rope_deltas = None
        states = model.model(inputs_embeds=embedded).last_hidden_state
        x, weights = states[ids == words.convert_tokens_to_ids(MARK)], head_state()
        for layer in SHAPES:
            name = f"rm_heads.head_{head}.{layer}"
            x = F.linear(x.relu() if layer else x, weights[f"{name}.weight"], weights[f"{name}.bias"])
        means.append(x[0, 0])
    return torch.stack(means).mean()


def test_it_is_the_published_formula(reward, model, words):
    images, prompts = pictures(3), [*PROMPTS, edit("make it red", 2)]
    wanted = torch.stack([published(model, words, i, p) for i, p in zip(images, prompts, strict=True)])
    torch.testing.assert_close(reward(images, prompts), wanted, rtol=0, atol=5e-5)


def test_the_chat_template_is_the_bases_own(base, folder, model, words, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    other = marked(base, [])
    other.chat_template = MIMO
    other.save_pretrained(tmp_path)
    found = rewards.load(f"edit_reward:{folder}@{tmp_path}")(pictures(1), PROMPTS[:1])
    wanted = published(model, words, pictures(1)[0], PROMPTS[0], MIMO)
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=5e-5)
    assert abs(wanted - published(model, words, pictures(1)[0], PROMPTS[0])) > 4e-4
    other.chat_template = CHAT.replace("<|vision_start|>", "Picture: <|vision_start|>")
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not write two images and a text as"):
        rewards.load(f"edit_reward:{folder}@{tmp_path}")


@covers("edit_reward")
def test_it_keeps_to_what_rewards_keep_to(reward):
    spread = reward(pictures(), some(PROMPTS, 6)).std().item()
    conforms(reward, PROMPTS, tolerance=spread / 5, differentiable=True)


def test_bfloat16(spec):
    assert_bfloat16_keeps_the_order(spec, PROMPTS, 0.85)


def test_source_prompt_and_edit_are_read(reward):
    one, other = pictures(2)
    scores = reward(
        [one, one, one, other],
        [edit("make it red"), edit("make it red", 3), edit("make it blue"), edit("make it red")],
    )
    assert (scores[1:] - scores[0]).abs().min() > 3e-4


def test_prompts_without_a_source_are_refused(reward):
    with pytest.raises(UserError, match="'edit_reward' judges edits, and the prompt 'a cat' has no source"):
        reward(pictures(2), ["a cat", "a dog"])
    with pytest.raises(UserError, match="1 of 2 prompts have a source image, and 'a dog' has none"):
        reward(pictures(2), [PROMPTS[0], "a dog"])
    with pytest.raises(UserError, match=r"holds '<\|Reward\|>'"):
        reward(pictures(1), [edit("a <|Reward|>")])
    assert rewards.REGISTRY["edit_reward"].edits


@pytest.mark.parametrize(
    ("question", "digest"),
    [
        ("following", "b8c53a0a3b67db1cf63ad891679be423fbe01a06fa63cefe4851f747f8d82da2"),
        ("quality", "4583db70a7aba6038d80220b94bafc33755ece3389f3c1d3c24dd3ed847d9289"),
    ],
)
def test_the_instructions_are_the_published_ones(question, digest):
    """Digests of INSTRUCTION_EDIT_... of prompts.py + prompt_with_special_token of the collator."""
    assert hashlib.sha256(template(f"edit_reward_{question}").encode()).hexdigest() == digest


def test_other_files_are_refused(model, base, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch model.safetensors of TIGER-Lab/EditReward-Qwen2"):
        rewards.load("edit_reward")
    with pytest.raises(UserError, match=r"has none of model.safetensors, model.pth"):
        rewards.load(f"edit_reward:{tmp_path}@{base}")
    with pytest.raises(UserError, match=r"there is no file '/nowhere/x.pth'"):
        rewards.load(f"edit_reward:/nowhere/x.pth@{base}")
    file = tmp_path / "model.pth"
    torch.save(dict(model.state_dict()), file)
    with pytest.raises(UserError, match=r"has no layer rm_heads.head_0.0 of a head; it is no EditReward"):
        rewards.load(f"edit_reward:{tmp_path}@{base}")
    broken = head_state() | {"rm_heads.head_0.0.weight": torch.zeros(24, 5)}
    torch.save(dict(model.state_dict()) | broken, file)
    with pytest.raises(UserError, match=r"take 5 numbers, but its language model makes 32"):
        rewards.load(f"edit_reward:{file}@{base}")
