"""Weights of open_clip as transformers' CLIPModel, held against open_clip itself."""

import pytest
import torch

from diffalign.errors import UserError
from diffalign.rewards.zoo.clip import unit
from diffalign.rewards.zoo.open_clip_layout import clip_config, load_open_clip, to_clip_state
from tests.rewards.conftest import make_open_clip


def both(original, **settings):
    return load_open_clip("hpsv2", original.state_dict(), "x.pt", **settings).eval()


@pytest.fixture(scope="session")
def original():
    return make_open_clip()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 28, 28, generator=generator)
    ids = torch.zeros(3, 12, dtype=torch.long)
    for row, length in enumerate((2, 7, 12)):  # start, words, end, then zeros
        ids[row, :length] = torch.randint(1, 49405, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 49406, 49407
    return pixels, ids


def compare(original, model, inputs):
    pixels, ids = inputs
    with torch.no_grad():
        images, texts = original.encode_image(pixels), original.encode_text(ids)
        looks = model.get_image_features(pixels).pooler_output
        words = model.get_text_features(ids).pooler_output
    torch.testing.assert_close(looks, images, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(words, texts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(unit(looks) @ unit(words).T, unit(images) @ unit(texts).T, rtol=0, atol=1e-6)
    assert torch.equal(model.logit_scale, original.logit_scale)


def test_features_are_open_clips(original, inputs):
    compare(original, both(original), inputs)


def test_quick_gelu_is_told_and_not_read_off_the_weights(inputs):
    original = make_open_clip(quick_gelu=True)
    compare(original, both(original, activation="quick_gelu"), inputs)
    with pytest.raises(AssertionError):
        compare(original, both(original), inputs)


def test_a_config_says_what_weights_cannot(inputs):
    original = make_open_clip(head_width=32)  # four heads of 32
    config = clip_config("hpsv2", to_clip_state("hpsv2", original.state_dict(), "x.pt"), "x.pt")
    assert config.vision_config.num_attention_heads == 2
    config.vision_config.num_attention_heads = 4
    compare(original, both(original, config=config), inputs)


def test_sizes_are_read_off_the_weights(original):
    config = clip_config("hpsv2", to_clip_state("hpsv2", original.state_dict(), "x.pt"), "x.pt")
    text, vision = config.text_config, config.vision_config
    assert (text.hidden_size, text.num_attention_heads, text.num_hidden_layers) == (64, 1, 2)
    assert (text.vocab_size, text.max_position_embeddings, text.intermediate_size) == (49408, 12, 256)
    assert (vision.hidden_size, vision.num_attention_heads, vision.num_hidden_layers) == (128, 2, 3)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (28, 7, 512)
    assert config.projection_dim == 16 and vision.hidden_act == text.hidden_act == "gelu"
    assert vision.layer_norm_eps == text.layer_norm_eps == 1e-5


def test_the_real_size_is_vit_h_14():
    """From open_clip's own configuration: every name and shape, without the memory."""
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        state = open_clip.model.CLIP(**config).state_dict()
    renamed = to_clip_state("hpsv2", state, "x.pt")
    found = clip_config("hpsv2", renamed, "x.pt")
    text, vision = found.text_config, found.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (1280, 32, 16)
    assert (vision.intermediate_size, vision.patch_size, vision.image_size) == (5120, 14, 224)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (1024, 24, 16)
    assert (text.intermediate_size, found.projection_dim) == (4096, 1024)
    load_open_clip("hpsv2", state, "x.pt")  # all names and shapes fit
    assert sum(tensor.numel() for tensor in state.values()) == 986_109_441


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-B-32", "ViT-g-14", "ViT-bigG-14"])
def test_heads_are_those_of_open_clips_configurations(name):
    open_clip = pytest.importorskip("open_clip")
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.model.CLIP(**config).state_dict()
    found = clip_config(name, to_clip_state(name, state, "x.pt"), "x.pt")
    vision = config["vision_cfg"]
    assert found.vision_config.num_attention_heads == vision["width"] // vision.get("head_width", 64)
    assert found.text_config.num_attention_heads == config["text_cfg"]["heads"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda state: state.update({"visual.trunk.norm.weight": torch.zeros(2)}),
            "visual.trunk.norm.weight",
        ),
        (lambda state: state.pop("visual.conv1.weight"), "no OpenCLIP model"),
        (lambda state: state.pop("visual.proj"), "no OpenCLIP model"),
        (
            lambda state: state.pop("ln_final.bias"),
            "1 weights differ, first text_model.final_layer_norm.bias",
        ),
        (
            lambda state: state.pop("transformer.resblocks.1.attn.in_proj_weight"),
            "3 weights differ, first text_model.encoder.layers.1.self_attn.k_proj.weight",
        ),
    ],
)
def test_another_models_checkpoint_is_refused(original, change, words):
    state = dict(original.state_dict())
    change(state)
    with pytest.raises(UserError, match="another model's checkpoint") as error:
        load_open_clip("hpsv2", state, "x.pt")
    assert words in str(error.value) and "x.pt" in str(error.value)
