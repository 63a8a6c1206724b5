"""MPS on a tiny random checkpoint in the layout of RE-N-Y/mpsv1, against its formula written out."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.cross_model import rotated
from diffalign.rewards.zoo.mps import CRITERIA, relevant_tokens
from tests.rewards import conformance
from tests.rewards.conformance import conforms, covers, pictures
from tests.rewards.conftest import make_clip

WIDTH, HEADS, HEAD, LAYERS = 16, 2, 8, 2
PROMPTS = ["a red cat", "light, color", "", "the long prompt that is cut " * 3, "Red hair", "a blue dog"]


@pytest.fixture(scope="session")
def weights(clip_folder, tmp_path_factory):
    """Every tensor of such a file: the CLIP, the cross model, and the buffers that its classes have."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"mps.model.{name}": tensor for name, tensor in load_file(clip_folder / "model.safetensors").items()
    }
    inner = HEADS * HEAD
    sizes = {
        "0.fn.to_q": (inner, WIDTH),
        "0.fn.to_kv": (2 * HEAD, WIDTH),
        "0.fn.to_out": (WIDTH, inner),
        "0.fn.ff.0": (8 * WIDTH, WIDTH),
        "0.fn.ff.2": (WIDTH, 4 * WIDTH),
        "1.fn.fused_attn_ff_proj": (inner + 2 * HEAD + 8 * WIDTH, WIDTH),
        "1.fn.attn_out": (WIDTH, inner),
        "1.fn.ff_out.1": (WIDTH, 4 * WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"mps.cross_model.layers.{layer}."
        for name, size in sizes.items():
            state[f"{prefix}{name}.weight"] = torch.randn(size, generator=generator) * size[1] ** -0.5
        for block in "01":
            state[f"{prefix}{block}.fn.norm.weight"] = 1 + torch.randn(WIDTH, generator=generator) / 4
            state[f"{prefix}{block}.fn.norm.bias"] = torch.zeros(WIDTH)
        state[f"{prefix}1.fn.rotary_emb.inv_freq"] = 10000 ** (-torch.arange(0, HEAD, 2) / HEAD)
    path = tmp_path_factory.mktemp("mps") / "model.safetensors"
    save_file(state, path)
    return path


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def normed(x, weight):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight


def gated(x):
    value, gate = np.split(x, 2, axis=-1)
    return value * gate / (1 + np.exp(-gate))


def turned(x):
    """x (L, d): at position p the pair (x_j, x_{j + d/2}) turns by p 10000^(-2j/d)."""
    half = x.shape[1] // 2
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-2 * np.arange(half) / x.shape[1])
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def cross_model(state, looks, words, kept):
    """One image's tokens (L, D) and its prompt's (M, D), of which ``kept`` (M,) are looked at."""
    get = lambda layer, name: state[f"mps.cross_model.layers.{layer}.{name}.weight"].double().numpy()  # noqa: E731
    x = looks
    for layer in range(LAYERS):
        h = normed(x, get(layer, "0.fn.norm"))
        queries = h @ get(layer, "0.fn.to_q").T
        keys, values = np.split(words @ get(layer, "0.fn.to_kv").T, 2, axis=1)
        hide = np.where(kept, 0.0, -np.inf)
        parts = np.split(queries, HEADS, axis=1)
        seen = [softmax(part @ keys.T / np.sqrt(HEAD) + hide) @ values for part in parts]
        more = gated(h @ get(layer, "0.fn.ff.0").T) @ get(layer, "0.fn.ff.2").T
        x = x + np.concatenate(seen, axis=1) @ get(layer, "0.fn.to_out").T + more
        h = normed(x, get(layer, "1.fn.norm")) @ get(layer, "1.fn.fused_attn_ff_proj").T
        queries, keys, values, wide = np.split(h, np.cumsum([HEADS * HEAD, HEAD, HEAD]), axis=1)
        parts = [turned(part) for part in np.split(queries, HEADS, axis=1)]
        seen = [softmax(part @ turned(keys).T / np.sqrt(HEAD)) @ values for part in parts]
        x = x + np.concatenate(seen, axis=1) @ get(layer, "1.fn.attn_out").T
        x = x + gated(wide) @ get(layer, "1.fn.ff_out.1").T
    return x


def published(weights, clip_folder, reward, images, prompts, threshold=0.01):
    """exp(logit_scale) cos(text, class token), one by one, as the README calls it."""
    state, clip = load_file(weights), CLIPModel.from_pretrained(clip_folder).eval()
    scores = []
    for image, prompt in zip(images, prompts, strict=True):
        with torch.no_grad():
            ids = [reward.clip.tokens([text]) for text in (prompt, CRITERIA)]
            text, criteria = (clip.text_model(i).last_hidden_state[0] for i in ids)
            words, criteria = (clip.text_projection(x).double().numpy() for x in (text, criteria))
            end = int(ids[0][0].argmax())
            states = clip.vision_model(reward.clip.inputs([image])).last_hidden_state[0]
            looks = clip.visual_projection(states).double().numpy()
        similar = (words @ criteria.T).max(1)
        seen = cross_model(state, looks, words, similar / similar.max() > threshold)[0]
        cosine = seen @ words[end] / np.linalg.norm(seen) / np.linalg.norm(words[end])
        scores.append(np.exp(clip.logit_scale.item()) * cosine)
    return torch.tensor(scores).float()


@pytest.mark.parametrize("threshold", [0.01, 0.3])
def test_it_is_its_formula(weights, clip_folder, threshold):
    option = "" if threshold == 0.01 else "@threshold=0.3"
    reward = rewards.load(f"mps:{weights}@{clip_folder}{option}", batch_size=4)
    wanted = published(weights, clip_folder, reward, pictures(), PROMPTS, threshold)
    torch.testing.assert_close(reward(pictures(), PROMPTS), wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 1
    other = published(weights, clip_folder, reward, pictures(), PROMPTS, 0.31 - threshold)
    assert (other - wanted).abs().max() > 0.02  # the threshold matters to these prompts


@covers("mps")
def test_it_conforms(weights, clip_folder):
    reward = rewards.load(f"mps:{weights}@{clip_folder}")
    spread = reward(pictures(), PROMPTS[:1] * 6).std().item()
    conforms(reward, PROMPTS, tolerance=spread / 10, differentiable=True)


def test_bfloat16_keeps_the_order(weights, clip_folder):
    conformance.assert_bfloat16_keeps_the_order(f"mps:{weights}@{clip_folder}", PROMPTS, correlation=0.95)


def test_words_are_weighed_within_their_own_prompt():
    criteria = torch.eye(2)
    words = torch.tensor([[[1.0, 0.0], [0.2, 0.0], [0.0, 0.4]], [[100.0, 0.0], [0.5, 0.0], [-1.0, -1.0]]])
    assert relevant_tokens(words, criteria, 0.3).tolist() == [[True, False, True], [True, False, False]]
    assert relevant_tokens(words, criteria, 0.01).tolist() == [[True, True, True], [True, False, False]]
    for row in (0, 1):
        assert torch.equal(
            relevant_tokens(words[row : row + 1], criteria, 0.3)[0],
            relevant_tokens(words, criteria, 0.3)[row],
        )
    # a largest similarity below 0 turns all signs round, so that every word is kept, as published
    assert relevant_tokens(-words[:1] - 2, criteria, 0.3).all()


def test_rotation_is_that_of_complex_numbers():
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for row in range(2):
        np.testing.assert_allclose(rotated(x)[row], turned(x[row].numpy()), atol=1e-6)
    assert rotated(x.bfloat16()).dtype == torch.bfloat16


def test_the_published_size_is_read_off_the_weights():
    """Width 1024, 16 heads of 64 over one of keys and values, feed-forward of 4, four layers of two."""
    from diffalign.rewards.zoo.cross_model import CrossModel, empty_cross_model

    with torch.device("meta"):
        state = CrossModel(4, 1024, 1024, 64, 4096).state_dict()
    found = empty_cross_model(state)
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    block = 1024 * (2 * 1024 + 2 * 64 + 3 * 4096) + 2 * 1024  # either of the two, with its norm
    assert sum(tensor.numel() for tensor in state.values()) == 4 * 2 * block


def test_biases_that_were_not_saved_are_none(weights, clip_folder, tmp_path):
    state = {key: tensor for key, tensor in load_file(weights).items() if not key.endswith("fn.norm.bias")}
    save_file(state, tmp_path / "model.safetensors")
    spec = f"mps:{tmp_path}@{clip_folder}"  # the folder has the file under its published name
    wanted = rewards.load(f"mps:{weights}@{clip_folder}")(pictures(3), PROMPTS[:3])
    assert torch.equal(rewards.load(spec)(pictures(3), PROMPTS[:3]), wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.update({"model.x": torch.zeros(1)}), "MPS has no weight model.x"),
        (lambda state: state.pop("mps.cross_model.layers.0.0.fn.to_q.weight"), "no cross model"),
        (lambda state: state.pop("mps.cross_model.layers.1.0.fn.to_q.weight"), "layers.1.across.to_q.weight"),
        (lambda state: state.update({"mps.cross_model.extra": torch.zeros(1)}), "first extra"),
        (lambda state: state.pop("mps.model.logit_scale"), "logit_scale"),
    ],
)
def test_another_models_checkpoint_is_refused(weights, clip_folder, tmp_path, change, words):
    state = load_file(weights)
    change(state)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another model's checkpoint") as error:
        rewards.load(f"mps:{tmp_path / 'other.safetensors'}@{clip_folder}")
    assert words in str(error.value)


def test_bad_sources(weights, clip_folder, tmp_path):
    with pytest.raises(UserError, match=r"cannot fetch model.safetensors of RE-N-Y/mpsv1"):
        rewards.load("mps")
    with pytest.raises(UserError, match=r"threshold=1.5 would keep no word"):
        rewards.load(f"mps:{weights}@{clip_folder}@threshold=1.5")
    with pytest.raises(UserError, match="cannot load '/no/clip'"):
        rewards.load(f"mps:{weights}@/no/clip")
    with pytest.raises(UserError, match="another model's checkpoint"):
        rewards.load(f"mps:{weights}@{make_clip(tmp_path / 'wide', width=24)}")
    save_file({"layers.0.weight": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(UserError, match=r"MPS has no weight layers.0.weight"):  # before the hub is asked
        rewards.load(f"mps:{tmp_path / 'head.safetensors'}")
    (tmp_path / "MPS_overall_checkpoint.pth").write_bytes(b"a pickle")
    with pytest.raises(UserError, match="not a checkpoint of plain tensors"):
        rewards.load(f"mps:{tmp_path / 'MPS_overall_checkpoint.pth'}@{clip_folder}")


def test_a_prompt_with_a_mark_is_refused(weights, clip_folder):
    reward = rewards.load(f"mps:{weights}@{clip_folder}")
    with pytest.raises(UserError, match=r"'a <\|endoftext\|> cat' holds <\|endoftext\|>"):
        reward(pictures(1), ["a <|endoftext|> cat"])
