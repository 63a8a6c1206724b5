"""HPS v2 on a tiny random open_clip CLIP in the published layout, against open_clip's own computation."""

import html

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD
from diffalign.rewards.zoo.hps import token_ids
from tests.rewards import conformance
from tests.rewards.conformance import as_pixels, conforms, covers, pictures
from tests.rewards.conftest import SIZE, make_open_clip

open_clip = pytest.importorskip("open_clip")
PROMPTS = [
    "a red cat",
    "A DOG\u2019s \u201cbest\u201d  friend &amp;amp; a\tcaf\u00c3\u00a9",  # curly quotes, broken accents
    "",
    "the long prompt that is cut " * 5,
    "\u732b in the rain",
    "a blue dog",
]


@pytest.fixture(scope="session")
def original():
    return make_open_clip()


@pytest.fixture(scope="session")
def folder(original, tmp_path_factory):
    """Return the files as they are published: a dict with ``state_dict``, here in float32."""
    folder = tmp_path_factory.mktemp("hps")
    for name in ("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"):
        torch.save({"state_dict": original.state_dict(), "epoch": 1}, folder / name)
    return folder


def squares(images, antialias=True):
    """Apply the published pre-processing, written out for one image at a time."""
    rows = []
    for image in images:
        x = as_pixels(image)
        scale = SIZE / float(max(x.shape[2:]))
        size = [round(side * scale) for side in x.shape[2:]]
        if scale != 1.0:
            x = F.interpolate(x, size, mode="bicubic", antialias=antialias)
        high, wide = SIZE - size[0], SIZE - size[1]
        x = F.pad(x, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        rows.append((x - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1))
    return torch.cat(rows)


def published(original, images, prompts, antialias=True):
    ids = open_clip.tokenizer.SimpleTokenizer()(prompts, context_length=12)
    with torch.no_grad():
        looks = original.encode_image(squares(images, antialias), normalize=True)
        return (looks @ original.encode_text(ids, normalize=True).T).diagonal()


@pytest.mark.parametrize("name", ["hpsv2", "hpsv2_1"])
def test_it_is_open_clips_cosine(original, folder, name):
    reward = rewards.load(f"{name}:{folder}", batch_size=4)
    wanted = published(original, pictures(), PROMPTS)
    torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=0, atol=1e-5)
    assert wanted.std() > 0.05


def test_without_antialiasing_it_is_another_score(original, folder):
    legacy = rewards.load(f"hpsv2:{folder}@antialias=no")(pictures(), PROMPTS)
    wanted = published(original, pictures(), PROMPTS, antialias=False)
    torch.testing.assert_close(legacy, wanted, rtol=0, atol=1e-5)
    assert (legacy - published(original, pictures(), PROMPTS)).abs().max() > 0.01
    again = rewards.load(f"hpsv2:{folder / 'HPS_v2_compressed.pt'}@antialias=yes")(pictures(), PROMPTS)
    torch.testing.assert_close(again, published(original, pictures(), PROMPTS), rtol=0, atol=1e-5)


@covers("hpsv2", "hpsv2_1")
def test_it_conforms(folder):
    # images and pixels take one path, so the tolerance is rounding
    conforms(rewards.load(f"hpsv2:{folder}"), PROMPTS, tolerance=2e-5, differentiable=True)
    conforms(rewards.load(f"hpsv2_1:{folder}@antialias=no"), PROMPTS, tolerance=2e-5, differentiable=True)


def test_bfloat16_keeps_the_order(folder):
    conformance.assert_bfloat16_keeps_the_order(f"hpsv2:{folder}", PROMPTS)


def test_half_precision_weights_are_read_as_what_is_asked(original, folder, tmp_path):
    state = {key: tensor.half() for key, tensor in original.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "half.pt")
    reward = rewards.load(f"hpsv2:{tmp_path / 'half.pt'}")
    assert {p.dtype for p in reward.clip.model.parameters()} == {torch.float32}
    wanted = published(original, pictures(), PROMPTS)
    torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=0, atol=5e-3)


def test_a_config_may_give_the_heads(folder, tmp_path):
    original = make_open_clip(head_width=32)
    torch.save({"state_dict": original.state_dict()}, tmp_path / "hps.pt")
    config = rewards.load(f"hpsv2:{folder}").clip.model.config.to_dict()
    config["vision_config"]["num_attention_heads"] = 4
    CLIPConfig.from_dict(config).save_pretrained(tmp_path / "config")
    reward = rewards.load(f"hpsv2:{tmp_path / 'hps.pt'}@{tmp_path / 'config'}")
    wanted = published(original, pictures(), PROMPTS)
    torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=0, atol=1e-5)


def test_text_is_mended_before_it_is_read(folder):
    tokenizer = rewards.load(f"hpsv2:{folder}").clip.tokenizer
    plain = token_ids(tokenizer, ["a dog's best friend & a caf\u00e9"], 12)
    curly = token_ids(tokenizer, ["A dog\u2019s  best\nfriend &amp;amp; a caf\u00c3\u00a9 "], 12)
    assert torch.equal(plain, curly)
    assert token_ids(tokenizer, [""], 12).tolist() == [[49406, 49407] + [0] * 10]
    assert token_ids(tokenizer, ["long " * 40], 12)[0, -1] == 49407


@pytest.mark.parametrize("mark", ["<end_of_text>", "<START_OF_TEXT>", html.escape("<end_of_text>")])
def test_a_prompt_with_a_mark_is_refused(folder, mark):
    reward = rewards.load(f"hpsv2:{folder}")
    with pytest.raises(UserError, match="is a mark of the tokenizer") as error:
        reward(pictures(3), ["a cat", f"a {mark} dog", "a bird"])
    assert mark in str(error.value)
    assert reward(pictures(1), ["end of text < end_of_text >"]).isfinite().all()


def test_bad_checkpoints(original, folder, clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch HPS_v2.1_compressed.pt of xswu/HPSv2"):
        rewards.load("hpsv2_1")
    with pytest.raises(UserError, match=r"there is no file '/no/such.pt'"):
        rewards.load("hpsv2:/no/such.pt")
    with pytest.raises(UserError, match=r"there is no file .*HPS_v2_compressed.pt"):
        rewards.load(f"hpsv2:{tmp_path}")
    with pytest.raises(UserError, match="OpenCLIP has no weight text_model"):
        rewards.load(f"hpsv2:{clip_folder / 'model.safetensors'}")
    state = dict(original.state_dict()) | {"token_embedding.weight": torch.zeros(99, 64)}
    torch.save({"state_dict": state}, tmp_path / "words.pt")
    with pytest.raises(UserError, match="it knows 99 tokens"):
        rewards.load(f"hpsv2:{tmp_path / 'words.pt'}")
    with pytest.raises(UserError, match="'antialiased'; did you mean antialias"):
        rewards.load(f"hpsv2:{folder}@antialiased=no")
    with pytest.raises(UserError, match="antialias=maybe must be yes or no"):
        rewards.load(f"hpsv2:{folder}@antialias=maybe")
