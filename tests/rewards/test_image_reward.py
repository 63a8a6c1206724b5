"""ImageReward: a tiny random checkpoint of the published layout against the formula in plain torch."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import nn
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD
from diffalign.rewards.zoo.image_reward import LENGTH
from tests.rewards.conformance import (
    as_pixels,
    assert_bfloat16_keeps_the_order,
    conforms,
    covers,
    pictures,
    some,
)

SIZE, PATCH, WIDE, TEXT = 32, 8, 128, 24
LAYERS, LOOKING_HEADS, READING_HEADS = 2, 2, 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "blue", "dog", "on", "##s", "."]
PROMPTS = ["a red cat", "a", "a blue dog on a red cat .", "dogs", ""]
IDS = [[2, 5, 6, 7, 3], [2, 5, 3], [2, 5, 8, 9, 10, 5, 6, 7, 12, 3], [2, 9, 11, 3], [2, 3]]
LONG = " ".join(["a red dog on"] * 20)


def state_of(seed=0):
    """Random weights under the names of ImageReward.pt."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, outer, inner, bias=True):
        state[f"{name}.weight"] = torch.randn(outer, inner, generator=generator) / math.sqrt(inner)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(outer, generator=generator)

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    eyes, reader = "blip.visual_encoder", "blip.text_encoder"
    state[f"{eyes}.cls_token"] = torch.randn(1, 1, WIDE, generator=generator)
    state[f"{eyes}.pos_embed"] = torch.randn(1, (SIZE // PATCH) ** 2 + 1, WIDE, generator=generator)
    linear(f"{eyes}.patch_embed.proj", WIDE, 3 * PATCH**2)
    state[f"{eyes}.patch_embed.proj.weight"] = state[f"{eyes}.patch_embed.proj.weight"].view(
        WIDE, 3, PATCH, PATCH
    )
    for i in range(LAYERS):
        block = f"{eyes}.blocks.{i}"
        norm(f"{block}.norm1", WIDE), norm(f"{block}.norm2", WIDE)
        linear(f"{block}.attn.qkv", 3 * WIDE, WIDE), linear(f"{block}.attn.proj", WIDE, WIDE)
        linear(f"{block}.mlp.fc1", 2 * WIDE, WIDE), linear(f"{block}.mlp.fc2", WIDE, 2 * WIDE)
    norm(f"{eyes}.norm", WIDE)

    state[f"{reader}.embeddings.position_ids"] = torch.arange(48)[None]
    linear(f"{reader}.embeddings.word_embeddings", len(WORDS) + 2, TEXT, bias=False)
    linear(f"{reader}.embeddings.position_embeddings", 48, TEXT, bias=False)
    norm(f"{reader}.embeddings.LayerNorm", TEXT)
    for i in range(LAYERS):
        layer = f"{reader}.encoder.layer.{i}"
        for kind, other in (("attention", TEXT), ("crossattention", WIDE)):
            linear(f"{layer}.{kind}.self.query", TEXT, TEXT)
            linear(f"{layer}.{kind}.self.key", TEXT, other), linear(f"{layer}.{kind}.self.value", TEXT, other)
            linear(f"{layer}.{kind}.output.dense", TEXT, TEXT), norm(f"{layer}.{kind}.output.LayerNorm", TEXT)
        linear(f"{layer}.intermediate.dense", 2 * TEXT, TEXT)
        linear(f"{layer}.output.dense", TEXT, 2 * TEXT), norm(f"{layer}.output.LayerNorm", TEXT)
    linear("blip.vision_proj", 256, WIDE), linear("blip.text_proj", 256, TEXT)
    width = TEXT
    for number, size in ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1)):
        linear(f"mlp.layers.{number}", size, width)
        width = size
    return state


CONFIG = {  # the published file's names, and its encoder_width, which is not that of the ViT
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT,
    "initializer_range": 0.02,
    "intermediate_size": 2 * TEXT,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 48,
    "model_type": "bert",
    "num_attention_heads": READING_HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": len(WORDS) + 2,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def attention(query, key, value, heads):
    """softmax(q k / sqrt(d)) v of (L, width), head by head."""
    parts = zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True)
    return torch.cat([torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v for q, k, v in parts], 1)


def formula(state, pixels, ids):
    """Return the score of one normalised image (3, SIZE, SIZE) and token ids without padding, in float64."""
    state = {name: value.double() if value.is_floating_point() else value for name, value in state.items()}

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eyes, reader = "blip.visual_encoder", "blip.text_encoder"
    patches = F.unfold(pixels.double()[None], PATCH, stride=PATCH)[0].T
    kernel = state[f"{eyes}.patch_embed.proj.weight"].flatten(1)
    x = F.linear(patches, kernel, state[f"{eyes}.patch_embed.proj.bias"])
    x = torch.cat([state[f"{eyes}.cls_token"][0], x]) + state[f"{eyes}.pos_embed"][0]
    for i in range(LAYERS):
        block = f"{eyes}.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, 1)
        x = x + linear(attention(q, k, v, LOOKING_HEADS), f"{block}.attn.proj")
        inner = F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1"))
        x = x + linear(inner, f"{block}.mlp.fc2")
    looks = norm(x, f"{eyes}.norm", 1e-6)

    h = state[f"{reader}.embeddings.word_embeddings.weight"][ids]
    h = h + state[f"{reader}.embeddings.position_embeddings.weight"][: len(ids)]
    h = norm(h, f"{reader}.embeddings.LayerNorm", 1e-12)
    for i in range(LAYERS):
        layer = f"{reader}.encoder.layer.{i}"
        for kind, other in (("attention", None), ("crossattention", looks)):
            name = f"{layer}.{kind}"
            seen = h if other is None else other
            keys, values = linear(seen, f"{name}.self.key"), linear(seen, f"{name}.self.value")
            found = attention(linear(h, f"{name}.self.query"), keys, values, READING_HEADS)
            h = norm(linear(found, f"{name}.output.dense") + h, f"{name}.output.LayerNorm", 1e-12)
        inner = F.gelu(linear(h, f"{layer}.intermediate.dense"))
        h = norm(linear(inner, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    score = h[:1]
    for number in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{number}")
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def normalised(image):
    """(3, SIZE, SIZE) as the published transform has it: short side, centre, mean and std."""
    width, height = image.size
    short = min(width, height)
    size = (SIZE * width // short, SIZE * height // short)
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2.0) for side in size)  # as torchvision's CenterCrop
    pixels = as_pixels(small.crop((left, top, left + SIZE, top + SIZE)))[0]
    return (pixels - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1)


def write(folder, state, tokenizer=True):
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG))
    if tokenizer:
        (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


@pytest.fixture(scope="session")
def state():
    return state_of()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, state):
    return write(tmp_path_factory.mktemp("image_reward"), state)


@pytest.fixture
def reward(folder):
    return rewards.load(f"image_reward:{folder}", batch_size=2)


def test_scores_are_the_published_formulas(reward, state):
    images = pictures(len(PROMPTS))
    wanted = [formula(state, normalised(i), ids) for i, ids in zip(images, IDS, strict=True)]
    scores = reward(images, PROMPTS)
    assert torch.tensor(wanted).std() > 0.1
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_the_cut_is_torchvisions(reward, state):
    image = pictures(1)[0].resize((SIZE + 3, SIZE))  # 1.5 pixels on either side: transformers leaves 1, it 2
    expected = formula(state, normalised(image), IDS[0])
    assert reward([image], PROMPTS[:1]).item() == pytest.approx(expected, abs=2e-5)
    assert reward(as_pixels(image), PROMPTS[:1]).item() == pytest.approx(expected, abs=2e-5)
    beside = formula(state, normalised(image.crop((0, 0, SIZE + 2, SIZE))), IDS[0])
    assert abs(beside - expected) > 1e-3


@covers("image_reward")
def test_it_conforms(reward, folder):
    conforms(reward, [*PROMPTS, LONG], tolerance=0.02, differentiable=True)
    assert_bfloat16_keeps_the_order(f"image_reward:{folder}", PROMPTS)


def test_a_long_prompt_is_cut_at_35_tokens(reward, state):
    image = pictures(1)
    ids = [2, *([5, 6, 9, 10] * 20)[: LENGTH - 2], 3]
    assert len(ids) == 35
    scores = reward(image * 2, [LONG, LONG + " blue"])
    assert scores[0].item() == pytest.approx(formula(state, normalised(image[0]), ids), abs=2e-5)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)


def test_special_tokens_in_a_prompt_are_read_as_published(reward, state):
    image = pictures(1)
    ids = [[2, 5, 3, 7, 3], [2, 13, 7, 14, 3], [2, 0, 2, 3]]
    scores = reward(image * 3, ["a [SEP] cat", "[DEC] cat [ENC]", "[PAD] [CLS]"])
    wanted = [formula(state, normalised(image[0]), some_ids) for some_ids in ids]
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_layouts_as_downloaded(reward, folder, state, tmp_path):
    images, prompts = pictures(3), some(PROMPTS, 3)
    wanted = replace(reward, batch_size=16)(images, prompts)
    apart = write(
        tmp_path, {name: value for name, value in state.items() if "position_ids" not in name}, False
    )
    for spec in (f"{apart / 'ImageReward.pt'}@{folder}", f"{apart}@{folder}", f"{folder / 'ImageReward.pt'}"):
        torch.testing.assert_close(
            rewards.load(f"image_reward:{spec}")(images, prompts), wanted, rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("mlp.layers.6.bias"), r"1 weights differ, first 6.bias"),
        (
            lambda s: s.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"),
            "1 weights differ",
        ),
        (lambda s: s.update({"blip.visual_encoder.more": torch.zeros(2)}), r"first more \(it has \(2,\)"),
        (lambda s: [s.pop(k) for k in list(s) if "visual" in k], "no BLIP under blip.visual_encoder"),
        (lambda s: s.update({"mlp.layers.0.weight": torch.zeros(3, 3)}), r"first 0.weight \(it has \(3, 3\)"),
    ],
)
def test_another_models_checkpoint_is_refused(state, tmp_path, change, words):
    other = dict(state)
    change(other)
    with pytest.raises(UserError, match=words):
        rewards.load(f"image_reward:{write(tmp_path, other)}")


def test_bad_sources_are_named(folder, state, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch ImageReward.pt of THUDM/ImageReward"):
        rewards.load("image_reward")
    with pytest.raises(UserError, match=r"there is no file '/absent/x.pt'"):
        rewards.load("image_reward:/absent/x.pt")
    with pytest.raises(UserError, match="tokenizer 'google-bert/bert-base-uncased'"):
        rewards.load(f"image_reward:{write(tmp_path, state, tokenizer=False)}")
    with pytest.raises(UserError, match="has 7 tokens with BLIP's two, the weights have 15"):
        rewards.load(f"image_reward:{tmp_path}@{tmp_path.parent}")  # a folder without any
    (tmp_path / "med_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no configuration of BLIP's BERT \(KeyError"):
        rewards.load(f"image_reward:{tmp_path}@{folder}")
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(UserError, match=r"med_config.json'; ImageReward.pt and med_config.json of THUDM"):
        rewards.load(f"image_reward:{tmp_path}")


def test_the_published_size_has_the_published_number_of_weights():
    from transformers.models.blip import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    looks = BlipVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=224, patch_size=16,
    )  # fmt: skip
    read = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, is_decoder=True)
    with torch.device("meta"):
        networks = [
            BlipVisionModel(looks),
            BlipTextModel(read, add_pooling_layer=False),
            nn.Linear(768, 1024),
        ]
    assert 0.44e9 < sum(p.numel() for network in networks for p in network.parameters()) < 0.45e9


@pytest.mark.hub
@pytest.mark.skipif(
    "IMAGEREWARD_IMAGES" not in os.environ, reason="IMAGEREWARD_IMAGES names no folder of its assets/images"
)
@pytest.mark.skipif(
    not isinstance(try_to_load_from_cache("THUDM/ImageReward", "ImageReward.pt"), str),
    reason="ImageReward.pt is not in the hub's cache",
)
def test_the_real_one_gives_its_published_scores():
    reward = rewards.load("image_reward")
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    files = sorted(Path(os.environ["IMAGEREWARD_IMAGES"]).glob("[1-4].webp"))
    scores = reward([Image.open(file) for file in files], [prompt] * 4)
    assert scores.tolist() == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=2e-3)
