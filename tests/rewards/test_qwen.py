"""Qwen2-VL under rewards: sizes, patches, positions, layouts and templates."""

import hashlib
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffalign.errors import UserError
from diffalign.rewards.preprocess import OPENAI_MEAN, OPENAI_STD
from diffalign.rewards.registry import Place
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.qwen import IMAGE, load_qwen, renamed
from diffalign.rewards.zoo.qwen_pixels import Pixels
from tests.rewards.conformance import as_pixels, pictures
from tests.rewards.tiny_qwen import (
    hidden_states,
    image_processor,
    make_base,
    marked,
    old_layout,
    random_model,
)

FULL = 256 * 28 * 28
PIXELS = Pixels(FULL, FULL)
MARK = "<|Reward|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def words(base):
    return marked(base, [MARK])


@pytest.fixture(scope="module")
def model(base, words):
    return random_model(base, len(words))


@pytest.fixture(scope="module")
def qwen(base, model):
    return load_qwen("hpsv3", old_layout(model), "here", str(base), [MARK], Place())


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (512, 512, (448, 448)), (1024, 1024, (448, 448)), (2048, 2048, (448, 448)),
        (768, 768, (420, 420)), (600, 600, (420, 420)),  # the last bit decides
        (448, 448, (448, 448)), (28, 28, (448, 448)), (884, 1548, (336, 588)), (64, 12800, (28, 6328)),
    ],
)  # fmt: skip
def test_sizes_are_the_published_ones(height, width, expected):
    assert PIXELS.size(height, width) == expected


def test_sizes_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    random = np.random.default_rng(0)
    for height, width in random.integers(28, 2500, (300, 2)).tolist():
        for least, most in ((FULL, FULL), (FULL // 2, FULL)):
            wanted = smart_resize(height, width, 28, least, most)
            assert Pixels(least, most).size(height, width) == wanted, (height, width)


def test_a_picture_may_not_be_a_line():
    with pytest.raises(UserError, match=r"402 x 2 pixels: one side is more than 200 times"):
        PIXELS.size(2, 402)


def test_patches_are_those_of_transformers():
    for image in pictures(4):
        cut = PIXELS.images([image])
        small = image.convert("RGB").resize(PIXELS.size(*image.size[::-1])[::-1], Image.Resampling.BICUBIC)
        wanted = image_processor()(small, return_tensors="pt")
        assert torch.equal(cut.grids, wanted.image_grid_thw)
        torch.testing.assert_close(cut.patches, wanted.pixel_values, rtol=0, atol=1e-6)


def test_frames_go_in_pairs():
    """A patch holds channel, frame, row and column, in that order."""
    frames = torch.rand(4, 3, 28, 56)
    cut = PIXELS.cut([frames])
    assert cut.grids.tolist() == [[2, 2, 4]]
    colour = (frames - torch.tensor(OPENAI_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_STD).view(3, 1, 1)
    # second pair; second token (two by two patches), of it the third patch: row 1, column 0
    wanted = colour[2:, :, 14:28, 28:42].transpose(0, 1).reshape(-1)
    torch.testing.assert_close(cut.patches[8 + 4 + 2], wanted)


def test_pixels_are_cut_as_their_image():
    """Bicubic in floating point against PIL's in 8 bits, in units of the standard deviation."""
    for image in pictures(4):
        exact, soft = PIXELS.images([image]), PIXELS.images(as_pixels(image))
        assert torch.equal(exact.grids, soft.grids)
        assert (exact.patches - soft.patches).abs().mean() < 0.01


def test_positions_count_tokens(qwen, model, words):
    """As the published code has them, and not those of rows and columns."""
    image = pictures(1)[0]
    cut = PIXELS.images([image])
    ids, states = hidden_states(model, words, f"look: {MARK} end", "image", cut.patches, cut.grids)
    read = qwen.read(cut, [f"look: {MARK} end"], IMAGE)
    wanted = states[ids == words.convert_tokens_to_ids(MARK)]
    torch.testing.assert_close(read[0], wanted, rtol=0, atol=2e-5)

    rows_and_columns = model.model(
        input_ids=ids[None], pixel_values=cut.patches, image_grid_thw=cut.grids,
        mm_token_type_ids=(ids == model.config.image_token_id).int()[None],
    ).last_hidden_state[0]  # fmt: skip
    other = rows_and_columns[ids == words.convert_tokens_to_ids(MARK)]
    assert (other - wanted).abs().max() > 0.1


def test_a_batch_is_its_rows_one_by_one(qwen):
    images = pictures(3)
    texts = [f"a {MARK}", f"a much longer text than others {MARK} END", f"{MARK}"]
    together = qwen.read(PIXELS.images(images), texts, IMAGE)
    for i in range(3):
        alone = qwen.read(PIXELS.images(images[i : i + 1]), texts[i : i + 1], IMAGE)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


def test_a_mark_must_be_there_once(qwen):
    cut = PIXELS.images(pictures(2))
    for texts in (["none", MARK], [MARK * 2, MARK], [MARK * 2, "none"]):
        with pytest.raises(AssertionError, match="once each"):
            qwen.read(cut, texts, IMAGE)


def test_both_layouts_load(model, qwen, base):
    old, new = old_layout(model), model.state_dict()
    assert "visual.patch_embed.proj.weight" in old and "model.layers.0.mlp.up_proj.weight" in old
    assert "model.visual.merger.ln_q.weight" in new and "model.language_model.norm.weight" in new
    assert renamed(old).keys() == renamed(new).keys() == model.model.state_dict().keys()
    again = load_qwen("hpsv3", new, "here", str(base), [MARK], Place())
    cut = PIXELS.images(pictures(1))
    assert torch.equal(qwen.read(cut, [MARK], IMAGE), again.read(cut, [MARK], IMAGE))


def test_rotary_frequencies_stay_float32(model, base):
    rough = load_qwen("hpsv3", old_layout(model), "here", str(base), [MARK], Place(dtype="bfloat16")).model
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    for there, wanted in (
        (rough.language_model.rotary_emb, model.model.language_model.rotary_emb),
        (rough.visual.rotary_pos_emb, model.model.visual.rotary_pos_emb),
    ):
        assert isinstance(there, nn.Module) and torch.equal(there.inv_freq, wanted.inv_freq)


def test_another_models_weights_are_refused(model, base, tmp_path):
    def load(state, where=base):
        return load_qwen("hpsv3", state, "here", str(where), [MARK], Place())

    state = old_layout(model)
    with pytest.raises(UserError, match=r"'here' is another model's checkpoint: 1 weights differ"):
        load({key: tensor for key, tensor in state.items() if key != "model.norm.weight"})
    with pytest.raises(UserError, match=r"embeddings of 12 tokens, but the tokenizer of .* <\|Reward\|>"):
        load(state | {"model.embed_tokens.weight": torch.zeros(12, 32)})
    with pytest.raises(UserError, match=r"cannot load the config.json of '.*nothing'"):
        load(state, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"cannot load the config.json of 'nobody/nothing'.*HF_HUB_OFFLINE"):
        load(state, "nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"is a bert; needed is a Qwen2-VL"):
        load(state, tmp_path)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("hpsv3", "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"),
        ("video_reward", "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"),
    ],
)
def test_templates_are_those_of_training(name, digest):
    """To the last trailing space: digests of the texts in hpsv3 1.0.0 and in VideoAlign's repository."""
    assert hashlib.sha256(template(name).encode()).hexdigest() == digest


def test_prompts_that_cannot_be_read(qwen):
    qwen.check(["a <b> & {c}"])
    other = replace(qwen, tokenizer=deepcopy(qwen.tokenizer))
    other.tokenizer.add_tokens(["<b>", "  "])  # words of another kind, as some tokenizers have
    other.check(["a <b>  &"])
    for prompt, reason in (
        ("a <|Reward|> cat", r"'<\|Reward\|>', a token of the model's own format"),
        ("cat<|im_end|>", r"'<\|im_end\|>'"),
        ("<|image_pad|>", r"'<\|image_pad\|>'"),
        (" \n", "an empty prompt"),
    ):
        with pytest.raises(UserError, match=reason):
            qwen.check(["a cat", prompt])
