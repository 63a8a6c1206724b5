"""VideoReward: tiny random checkpoints in both published layouts, with peft's own LoRA beside ours."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.media.videos import Video
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.video_reward import frame_indices
from tests.rewards.conformance import conforms_to_samples, covers
from tests.rewards.tiny_qwen import WIDTH, hidden_states, image_processor, make_base, marked, random_model

MARKS = ["<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>"]
NORMS = {"VQ_mean": 0.4, "VQ_std": 2.0, "MQ_mean": -0.2, "MQ_std": 0.5, "TA_mean": 0.1, "TA_std": 1.5}
RANK, ALPHA = 2, 4
CONFIG = {
    "data_config": {
        "meta_data": "", "data_dir": "", "max_frame_pixels": 200704, "num_frames": None, "fps": 2.0,
        "eval_dim": ["VQ", "MQ", "TA"], "prompt_template_type": "detailed_special", "sample_type": "uniform",
    },
    "training_args": {},
    "model_config": {"model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct", "use_special_tokens": True},
    "peft_lora_config": {"lora_enable": True, "lora_r": RANK, "lora_alpha": ALPHA, "use_rslora": False},
    "inference_config": NORMS,
}  # fmt: skip
PROMPTS = ["a red cat runs", "a much longer prompt of something that {moves} slowly", "a dog"]


def video(frames=9, height=40, width=60, seed=0):
    """Coloured cells that change."""
    cells = torch.rand(frames, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Video((F.interpolate(cells, (height, width)) * 255).to(torch.uint8), 8.0)


VIDEOS = [video(), video(33, 64, 28, seed=1), video(3, 56, 56, seed=2)]


def published_names(state):
    """Of transformers before 4.52, under peft."""
    old = {"model.visual.": "visual.", "model.language_model.": "model."}
    for new, name in old.items():
        state = {key.replace(f"model.{new}", f"model.{name}"): value for key, value in state.items()}
    return {key: value.clone() for key, value in state.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), weights=True)


@pytest.fixture(scope="module")
def words(base):
    return marked(base, MARKS)


@pytest.fixture(scope="module")
def adapted(base, words):
    """Return the base with rows for the tokens that training has changed, and a LoRA that does something."""
    model = random_model(base)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    linears = "q_proj|k_proj|v_proj|o_proj|up_proj|gate_proj|down_proj"
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=rf".*language_model.*\.({linears})", task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, lora).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    embeddings = model.get_input_embeddings().weight
    embeddings[-3:] = torch.randn(3, WIDTH, generator=generator)
    return peft


def head(outputs):
    return torch.randn(outputs, WIDTH, generator=torch.Generator().manual_seed(outputs)) / 3


def make(folder, adapted, outputs, whole, config=CONFIG):
    """Write a download of the hub repository: with one file of all weights, or with an adapter."""
    step = folder / "checkpoint-120"
    step.mkdir(parents=True)
    (folder / "checkpoint-20").mkdir()
    (folder / "model_config.json").write_text(json.dumps(config))
    rm_head = {"base_model.model.rm_head.weight": head(outputs)}
    if whole:
        torch.save(published_names(adapted.state_dict()) | rm_head, step / "model.pth")
        return folder
    save_file(published_names(get_peft_model_state_dict(adapted)), step / "adapter_model.safetensors")
    state = published_names(adapted.state_dict())
    trained = {key: state[key] for key in state if "embed_tokens" in key or "merger" in key}
    torch.save(trained | rm_head, step / "non_lora_state_dict.pth")
    return folder


@pytest.fixture(scope="module")
def folder(adapted, tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "VideoReward", adapted, 1, whole=True)


@pytest.fixture(scope="module")
def reward(folder, base):
    return rewards.load(f"video_reward:{folder}@{base}").score


def patches(clip, indices):
    """Of the frames, by transformers' processor of images, which takes each frame twice; and the grid."""
    height, width = {(40, 60): (280, 392), (64, 28): (504, 224), (56, 56): (336, 336)}[clip.frames.shape[2:]]
    pieces = []
    for frame in clip.frames[indices].float():
        small = F.interpolate(frame[None], (height, width), mode="bicubic", antialias=True)[0]
        array = small.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        twice = image_processor()(Image.fromarray(array), return_tensors="pt").pixel_values
        pieces.append(twice.view(len(twice), 3, 2, 14, 14)[:, :, 0])
    pairs = [torch.stack(pair, 2).flatten(1) for pair in zip(pieces[::2], pieces[1::2], strict=True)]
    return torch.cat(pairs), torch.tensor([[len(pairs), height // 14, width // 14]])


def published(adapted, words, clip, prompt, indices, outputs):
    """VQ, MQ and TA as the released code computes them, with peft's LoRA unmerged."""
    text = template("video_reward").format(text_prompt=prompt)
    inside = adapted.base_model.model
    ids, states = hidden_states(inside, words, text, "video", *patches(clip, indices))
    logits = states @ head(outputs).T
    found = []
    for number, (name, mark) in enumerate(zip(("VQ", "MQ", "TA"), MARKS, strict=True)):
        (value,) = logits[ids == words.convert_tokens_to_ids(mark)]
        raw = value[number] if outputs == 3 else value[0]
        found.append((raw - NORMS[f"{name}_mean"]) / NORMS[f"{name}_std"])
    return torch.stack(found)


WATCHED = [[0, 3, 5, 8], [0, 5, 9, 14, 18, 23, 27, 32], [0, 2]]


def test_it_is_the_published_formula(reward, adapted, words):
    found = reward.dimensions(VIDEOS, PROMPTS)
    for i, indices in enumerate(WATCHED):
        wanted = published(adapted, words, VIDEOS[i], PROMPTS[i], indices, 1)
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=2e-4)
    torch.testing.assert_close(reward(VIDEOS, PROMPTS), found.sum(1))


def test_three_outputs_are_read_one_at_each_token(adapted, words, base, tmp_path):
    three = rewards.load(f"video_reward:{make(tmp_path / 'x', adapted, 3, whole=True)}@{base}").score
    found = three.dimensions(VIDEOS[:1], PROMPTS[:1])[0]
    wanted = published(adapted, words, VIDEOS[0], PROMPTS[0], WATCHED[0], 3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


def test_an_adapter_scores_as_the_whole(reward, adapted, base, tmp_path):
    other = rewards.load(f"video_reward:{make(tmp_path / 'x', adapted, 1, whole=False)}@{base}").score
    torch.testing.assert_close(
        other.dimensions(VIDEOS, PROMPTS), reward.dimensions(VIDEOS, PROMPTS), rtol=0, atol=1e-5
    )


@covers("video_reward", "video_reward_vq", "video_reward_mq", "video_reward_ta")
@pytest.mark.parametrize("name", ["video_reward", "video_reward_vq", "video_reward_mq", "video_reward_ta"])
def test_it_conforms(folder, base, name):
    conforms_to_samples(
        lambda size: rewards.load(f"{name}:{folder}@{base}", batch_size=size), VIDEOS[:3], PROMPTS[:3]
    )


def test_each_dimension_is_a_reward(reward, folder, base):
    found = reward.dimensions(VIDEOS, PROMPTS)
    for number, name in enumerate(("vq", "mq", "ta")):
        one = rewards.load(f"video_reward_{name}:{folder}@{base}")
        assert torch.equal(one(VIDEOS, PROMPTS), found[:, number])


def test_a_batch_is_its_videos_one_by_one(reward):
    together = reward(VIDEOS, PROMPTS)
    assert together.shape == (3,) and together.dtype == torch.float32 and together.std() > 0.01
    for size in (1, 2):
        smaller = replace(reward, batch_size=size)(VIDEOS, PROMPTS)
        torch.testing.assert_close(smaller, together, rtol=0, atol=1e-4)
    order = [2, 0, 1]
    turned = reward([VIDEOS[i] for i in order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(turned, together[order], rtol=0, atol=1e-4)
    assert reward([], []).shape == (0,)


@pytest.mark.parametrize(
    ("count", "fps", "expected"),
    [
        (2, 8.0, [0, 1]), (5, 30.0, [0, 1, 3, 4]), (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (16, 2.0, list(range(16))), (9, 1.0, [0, 1, 2, 3, 5, 6, 7, 8]),
    ],
)  # fmt: skip
def test_two_frames_a_second_are_watched(count, fps, expected):
    assert frame_indices(count, fps, 2.0) == expected


def test_long_videos_are_thinned():
    assert len(frame_indices(10000, 2.0, 2.0)) == 768


@pytest.mark.parametrize("prompt", ["look <|MQ_reward|>", ""])
def test_prompts_it_cannot_read(reward, prompt):
    with pytest.raises(UserError, match="reward 'video_reward'"):
        reward(VIDEOS[:2], ["a", prompt])


def test_a_single_frame_is_no_video(reward):
    with pytest.raises(UserError, match="a video of 1 frames; it must have at least 2"):
        reward([video(1)], ["a"])


def test_images_are_refused(folder, base):
    with pytest.raises(UserError, match="judges videos, and these are images"):
        rewards.load(f"video_reward:{folder}@{base}")([Image.new("RGB", (30, 30))], ["a"])


def test_other_folders_are_refused(adapted, base, tmp_path):
    def refused(path, reason):
        with pytest.raises(UserError, match=reason):
            rewards.load(f"video_reward:{path}@{base}")

    refused(tmp_path, r"model_config.json' is not there or not VideoAlign's")
    (tmp_path / "model_config.json").write_text(json.dumps(CONFIG))
    refused(tmp_path, "there is no checkpoint-STEP folder")
    (tmp_path / "checkpoint-7").mkdir()
    refused(tmp_path, r"there is no file '.*checkpoint-7/adapter_model.safetensors'")
    other = CONFIG | {"data_config": CONFIG["data_config"] | {"prompt_template_type": "simple"}}
    (tmp_path / "model_config.json").write_text(json.dumps(other))
    refused(tmp_path, "has prompt_template_type 'simple'; known is 'detailed_special'")
    refused(make(tmp_path / "two", adapted, 2, whole=True), "it has one of 2 outputs")
    with pytest.raises(UserError, match=r"cannot fetch model_config.json of KwaiVGI/VideoReward"):
        rewards.load("video_reward")


def test_an_adapter_of_another_base_is_refused(adapted, base, tmp_path):
    folder = make(tmp_path / "x", adapted, 1, whole=False)
    file = folder / "checkpoint-120" / "adapter_model.safetensors"
    save_file({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2, WIDTH)}, file)
    with pytest.raises(UserError, match=r"a LoRA of language_model.layers.9.mlp.up_proj, which the base"):
        rewards.load(f"video_reward:{folder}@{base}")
