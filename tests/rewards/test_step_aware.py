"""The step-aware preference model: its network in numpy, its start, its files, its scores."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffalign import rewards, tiny
from diffalign.errors import UserError
from diffalign.rewards.registry import Place, takes_pixels
from diffalign.rewards.zoo import step_aware
from diffalign.rewards.zoo.pickscore import PickScore
from diffalign.rewards.zoo.step_aware import StepAware, TimedReward, from_clip, timesteps
from diffalign.rewards.zoo.timed_clip import TimedLayer, TimeEmbedding, sinusoid
from diffalign.tiny import scenes
from diffalign.types import Reward
from tests.rewards import conformance
from tests.rewards.conftest import SIZE, make_clip

TIMES = torch.tensor([0.0, 0.001, 0.25, 0.7, 0.999])


@pytest.fixture
def fresh(clip_folder):
    return StepAware(from_clip(str(clip_folder), Place()), batch_size=2)


@pytest.fixture
def moved(clip_folder):
    """Return a model that depends on the time."""
    torch.manual_seed(0)  # the new layers are drawn
    clip = from_clip(str(clip_folder), Place())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in clip.model.named_parameters():
        if "adaLN" in name or "t_embedder" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return StepAware(clip, batch_size=2)


@pytest.fixture
def pixels():
    return torch.rand(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def published(clip):
    """Return the state dict as RockeyCoss/SPO saved it: prefixed, with the buffers of older transformers."""
    state = {f"model.{name}": tensor for name, tensor in clip.model.state_dict().items()}
    for tower, length in (("text", 16), ("vision", 17)):
        state[f"model.{tower}_model.embeddings.position_ids"] = torch.arange(length)[None]
    return state


def test_the_sinusoid_is_cosines_then_sines():
    t = np.array([0, 1, 251, 999])
    angles = t[:, None] * 10000.0 ** (-np.arange(128) / 128)
    ours = sinusoid(torch.tensor(t))
    np.testing.assert_allclose(ours, np.hstack([np.cos(angles), np.sin(angles)]), atol=2e-4)
    assert ours.dtype == torch.float32 and sinusoid(torch.tensor(t).double()).dtype == torch.float64
    assert torch.equal(ours[0], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_the_embedding_is_two_layers_with_silu_between():
    embed = TimeEmbedding(16).double()
    t = torch.tensor([3, 700])
    first, second = embed.mlp[0], embed.mlp[2]
    hidden = sinusoid(t.double()).numpy() @ first.weight.detach().numpy().T + first.bias.detach().numpy()
    hidden = hidden / (1 + np.exp(-hidden))
    wanted = hidden @ second.weight.detach().numpy().T + second.bias.detach().numpy()
    np.testing.assert_allclose(embed(t).detach().numpy(), wanted, atol=1e-12)


class Looking(nn.Module):
    """attention(h) = Linear(h + mean over tokens), in a tuple as transformers has it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, hidden_states, attention_mask):
        return self.linear(hidden_states + hidden_states.mean(1, keepdim=True)), None


def test_a_layer_in_numpy():
    torch.manual_seed(0)
    look, think = nn.Linear(8, 8), nn.Linear(8, 8)
    norms = [nn.LayerNorm(8, elementwise_affine=False) for _ in range(2)]
    layer = TimedLayer(Looking(look), norms[0], nn.Sequential(think, nn.Tanh()), norms[1], 8).double()
    for parameter in layer.adaLN_modulation.parameters():
        nn.init.normal_(parameter)
    h, c = torch.randn(2, 3, 8).double(), torch.randn(2, 8).double()

    linear = lambda m, x: x @ m.weight.detach().numpy().T + m.bias.detach().numpy()  # noqa: E731
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)  # noqa: E731
    x, time = h.numpy(), c.numpy()
    modulation = linear(layer.adaLN_modulation[1], time / (1 + np.exp(-time)))
    shift, scale, gate, shift2, scale2, gate2 = (modulation[:, None, 8 * i : 8 * i + 8] for i in range(6))
    seen = normed(x) * (1 + scale) + shift
    x = x + gate * linear(look, seen + seen.mean(1, keepdims=True))
    x = x + gate2 * np.tanh(linear(think, normed(x) * (1 + scale2) + shift2))
    np.testing.assert_allclose(layer(h, c).detach().numpy(), x, atol=1e-12)


def test_a_fresh_one_scores_as_its_clip_to_the_bit_at_every_time(fresh, clip_folder, photos, words, pixels):
    clip = rewards.load(f"pickscore:{clip_folder}", batch_size=2)
    for images in (photos, pixels):
        wanted = clip(images, words)
        assert torch.equal(fresh(images, words), wanted)
        for t in (0.0, 0.3, 1.0):
            torch.testing.assert_close(
                fresh.at(images, words, torch.full((5,), t)), wanted, rtol=0, atol=1e-6
            )


def test_fresh_biases_are_one_for_gates_alone(fresh):
    model = fresh.clip.model
    width = model.config.vision_config.hidden_size
    for layer in model.vision_model.encoder.layers:
        parts = layer.adaLN_modulation[1].bias.view(6, width)
        assert [set(part.tolist()) for part in parts] == [{0.0}, {0.0}, {1.0}, {0.0}, {0.0}, {1.0}]
    assert not model.vision_model.adaLN_modulation[1].bias.any()
    assert 0.01 < float(model.t_embedder.mlp[0].weight.std()) < 0.03


def test_it_is_a_timed_reward_and_a_finished_image_is_time_zero(moved, photos, words):
    assert isinstance(moved, TimedReward) and isinstance(moved, Reward)
    assert not isinstance(PickScore(moved.clip), TimedReward)
    assert torch.equal(moved(photos, words), moved.at(photos, words, torch.zeros(5)))
    late = moved.at(photos, words, torch.full((5,), 0.9))
    assert (late - moved(photos, words)).abs().min() > 1e-4


def test_a_batch_is_its_images_one_by_one(moved, pixels):
    prompts = ["a red cat", "a blue dog", "a red cat", "Red", "a blue dog"]
    one_by_one = [
        moved.at(pixels[i : i + 1], prompts[i : i + 1], TIMES[i : i + 1]) for i in range(len(prompts))
    ]
    whole = replace(moved, batch_size=5).at(pixels, prompts, TIMES)
    torch.testing.assert_close(whole, torch.cat(one_by_one), rtol=0, atol=2e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    mixed = moved.at(pixels[order], [prompts[i] for i in order], TIMES[order])
    torch.testing.assert_close(mixed, whole[order], rtol=0, atol=2e-5)


def test_times_are_told_as_whole_timesteps(moved, pixels, words):
    assert timesteps(torch.tensor([0.0, 0.0004, 0.0006, 0.751, 1.0])).tolist() == [0, 0, 1, 751, 1000]
    near = moved.at(pixels, words, torch.full((5,), 0.2504))
    assert torch.equal(near, moved.at(pixels, words, torch.full((5,), 0.25)))
    for t in (-0.001, 1.001, math.nan):
        with pytest.raises(ValueError, match="allowed: times in"):
            moved.at(pixels, words, torch.full((5,), t))
    with pytest.raises(ValueError, match="one each is needed"):
        moved.at(pixels, words, torch.zeros(4))


def test_the_gradient_is_that_of_finite_differences(moved, pixels):
    model = moved.clip.model.double()
    image, t = pixels[:1].double().requires_grad_(), torch.tensor([0.6])
    ids = moved.clip.tokens(["a red cat"])

    def score(x):
        return model((x - 0.5) / 0.25, timesteps(t), ids, torch.zeros(1, dtype=torch.int64)).double().sum()

    direction = torch.randn(image.shape, generator=torch.Generator().manual_seed(3)).double()
    (gradient,) = torch.autograd.grad(score(image), image)
    # scores are float32: a smaller step drowns in rounding, a larger one in curvature
    step = 3e-3
    with torch.no_grad():
        slope = float(score(image + step * direction) - score(image - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=1e-3)


def test_pixels_get_a_gradient_through_the_reward(moved, pixels, words):
    pixels.requires_grad_()
    moved.at(pixels, words, TIMES).sum().backward()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(p.requires_grad for p in moved.clip.model.parameters())


def test_a_saved_folder_loads_and_scores_the_same(moved, photos, words, tmp_path):
    step_aware.save(moved.clip, tmp_path)
    loaded = rewards.load(f"step_aware:{tmp_path}")
    assert torch.equal(
        loaded.at(photos, words, TIMES), replace(moved, batch_size=16).at(photos, words, TIMES)
    )


def test_a_run_directory_is_its_reward_folder(moved, pixels, words, tmp_path):
    (tmp_path / "reward").mkdir()
    step_aware.save(moved.clip, tmp_path / "reward")
    torch.testing.assert_close(
        rewards.load(f"step_aware:{tmp_path}", batch_size=2).at(pixels, words, TIMES),
        moved.at(pixels, words, TIMES),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_published_layout_round_trips(moved, pixels, words, clip_folder, tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in published(moved.clip).items()}
    torch.save(state, tmp_path / "spm.bin")
    loaded = rewards.load(f"step_aware:{tmp_path / 'spm.bin'}@{clip_folder}", batch_size=2)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    wanted = moved.at(pixels, words, TIMES)
    torch.testing.assert_close(loaded.at(pixels, words, TIMES), wanted, rtol=0, atol=tolerance)


def test_names_are_the_published_ones(fresh):
    names = set(published(fresh.clip))
    assert {
        "model.logit_scale",
        "model.t_embedder.mlp.0.weight",
        "model.t_embedder.mlp.2.bias",
        "model.vision_model.adaLN_modulation.1.weight",
        "model.vision_model.encoder.layers.1.adaLN_modulation.1.bias",
        "model.vision_model.pre_layrnorm.weight",
        "model.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual_projection.weight",
    } <= names


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.t_embedder.mlp.0.bias"), r"1 weights differ.*t_embedder.mlp.0.bias"),
        (lambda state: state.update(extra=torch.zeros(2)), r"1 weights differ, first extra \(it has \(2,\)"),
        (
            lambda state: state.update({"model.visual_projection.weight": torch.zeros(3, 3)}),
            r"visual_projection.weight \(it has \(3, 3\)",
        ),
        (lambda state: state.update(note="text"), "no table of weights"),
    ],
)
def test_another_models_checkpoint_is_refused(fresh, clip_folder, tmp_path, change, words):
    state = published(fresh.clip)
    change(state)
    torch.save(state, tmp_path / "other.bin")
    with pytest.raises(UserError, match=words):
        rewards.load(f"step_aware:{tmp_path / 'other.bin'}@{clip_folder}")


def test_another_width_is_refused(fresh, tmp_path):
    torch.save(published(fresh.clip), tmp_path / "spm.bin")
    make_clip(tmp_path / "wide", width=24)
    with pytest.raises(UserError, match=r"another model.s checkpoint"):
        rewards.load(f"step_aware:{tmp_path / 'spm.bin'}@{tmp_path / 'wide'}")


def test_bad_sources_say_what_is_allowed(clip_folder, tmp_path):
    with pytest.raises(UserError, match="step_aware:sd15"):
        rewards.load("step_aware")
    with pytest.raises(UserError, match="does not exist; allowed: sd15, sdxl"):
        rewards.load(f"step_aware:{tmp_path / 'absent'}")
    with pytest.raises(UserError, match=r"has no step_aware.safetensors"):
        rewards.load(f"step_aware:{clip_folder}")
    (tmp_path / "bad.bin").write_bytes(b"no pickle")
    with pytest.raises(UserError, match="not a checkpoint of plain tensors"):
        rewards.load(f"step_aware:{tmp_path / 'bad.bin'}@{clip_folder}")
    with pytest.raises(UserError, match=r"cannot fetch sd-v1-5_step-aware_preference_model.bin"):
        rewards.load("step_aware:sd15")


def test_a_pickle_that_runs_code_is_refused(clip_folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    torch.save({"model.logit_scale": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(UserError, match="not a checkpoint of plain tensors"):
        rewards.load(f"step_aware:{tmp_path / 'evil.bin'}@{clip_folder}")


def test_the_tiny_clip_is_a_start(tmp_path):
    clip = from_clip(str(tiny.clip_path()), Place())
    step_aware.save(clip, tmp_path)
    prompts = tiny.prompts("test", 3)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    wanted = rewards.load("tiny_clip")(images, prompts)
    loaded = rewards.load(f"step_aware:{tmp_path}")
    torch.testing.assert_close(loaded.at(images, prompts, torch.full((3,), 0.5)), wanted, rtol=0, atol=1e-5)
    names = set(load_file(tmp_path / step_aware.WEIGHTS))
    assert set(load_file(tiny.clip_path() / "model.safetensors")) <= names


def test_the_shipped_model_prefers_true_captions_at_every_time_that_it_was_trained_at():
    random = np.random.default_rng(1)
    captions = tiny.prompts("test", 64)
    images = [scenes.render(scenes.scene_of(c, random)) for c in captions]
    reward = rewards.load("step_aware:tiny")
    for time in (0.0, 0.25, 0.5, 0.75):
        t = torch.full((64,), time)
        right, wrong = reward.at(images, captions, t), reward.at(images, captions[1:] + captions[:1], t)
        assert (right > wrong).float().mean() > 0.8


def test_without_antialias_pixels_and_images_take_the_released_resize():
    """The plain bicubic of torch, on 8-bit images as on their pixels; antialiasing gives another score."""
    spec, prompts = "step_aware:tiny@antialias=no", ["a large red circle"]
    image = conformance.pictures(3)[2].convert("RGB")
    plain, smooth = rewards.load(spec), rewards.load("step_aware:tiny")
    pixels, t = conformance.as_pixels(image), torch.tensor([0.5])
    torch.testing.assert_close(plain.at([image], prompts, t), plain.at(pixels, prompts, t), rtol=0, atol=1e-5)
    size = plain.clip.size
    small = torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=False).clamp(0, 1)
    torch.testing.assert_close(plain.at(pixels, prompts, t), smooth.at(small, prompts, t), rtol=0, atol=1e-4)
    assert (plain.at(pixels, prompts, t) - smooth.at(pixels, prompts, t)).abs() > 1e-3
    assert takes_pixels(spec) and not takes_pixels("step_aware:tiny") and not takes_pixels("jpeg")
