"""UnifiedReward-Edit: an endpoint that looks at its images, and a tiny Qwen3-VL of transformers."""

import hashlib
import io

import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.unified_reward_edit import worst
from diffalign.utils.http import UnusableError
from tests.rewards.conformance import conforms_to_samples, covers, pictures
from tests.rewards.endpoint import light, serving
from tests.rewards.tiny_qwen3 import make_base, random_model, save_processor


def grey(level):
    return Image.new("RGB", (40, 30), (level,) * 3)


def edit(text, level=0):
    buffer = io.BytesIO()
    grey(level).save(buffer, "PNG")
    return SourcedPrompt(text, buffer.getvalue())


@pytest.fixture
def address():
    """Rate an edit by how much lighter it is than its source, and its quality by how light it is."""
    asked = []

    def answer(path, body):
        *images, question = body["messages"][0]["content"]
        asked.append((len(images), question["text"]))
        levels = [light(image) for image in images]
        first = levels[1] - levels[0] if len(levels) == 2 else levels[0]
        return f'{{\n\n"reasoning" : "so",\n"score" : [25, {max(0, 25 * first):.4f}],\n}}'

    with serving(answer) as served:
        yield f"{served}@UnifiedReward", asked


@covers("unified_reward_edit")
def test_it_conforms(address):
    conforms_to_samples(
        lambda size: rewards.load(f"unified_reward_edit:{address[0]}", batch_size=size),
        pictures(4),
        [edit("a"), edit("b", 20), edit("c"), edit("a", 40)],
    )


def test_the_geometric_mean_of_the_lower_points(address):
    source, asked = address
    reward = rewards.load(f"unified_reward_edit:{source}")
    found = reward([grey(204), grey(204), grey(0)], [edit("make {it} red"), edit("b", 102), edit("c", 51)])
    wanted = [0.8, (0.4 * 0.8) ** 0.5, 0]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-4)
    following = template("unified_reward_edit_following").replace("{text_prompt}", "make {it} red")
    assert (2, following) in asked and (1, template("unified_reward_edit_quality")) in asked
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ('{\n"reasoning" : "[1, 2]",\n"score" : [20, 7.5],\n}', 7.5),
        ("{'score': [0, 25]}", 0),
        ('First "score": [1, 1]. No: "score": [9,8]', 8),
    ],
)
def test_answers_by_hand(answer, points):
    assert worst(answer) == points


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("Score: 5", "without"), ('"score" : [26, 3]', "outside 0 to 25"), ('"score": [-1, 3]', "outside")],
)
def test_answers_that_are_none(answer, reason):
    with pytest.raises(UnusableError, match=reason):
        worst(answer)


@pytest.mark.parametrize(
    ("question", "digest"),
    [
        ("following", "2149de6f83cf9946938abe6b089a62b94a64fc075d600bdb706ea470060ef9ec"),
        ("quality", "ddb40baa511dbf2fd619474e5a0fcd043c6325f976bfc8fd1f8b9fbf4c521113"),
    ],
)
def test_the_questions_are_the_published_ones(question, digest):
    """Digests of ``problem`` in edit_pointwise_....py, with {text_prompt} for the instruction."""
    assert hashlib.sha256(template(f"unified_reward_edit_{question}").encode()).hexdigest() == digest


def test_a_model_of_transformers_sees_both_images_here(tmp_path):
    """Its answers are written here: the tokens of a text that depends on the images it was given."""
    make_base(tmp_path)
    save_processor(tmp_path)
    random_model(tmp_path).save_pretrained(tmp_path)
    reward = rewards.load(f"unified_reward_edit:{tmp_path}")
    words, asked = reward.answerer.processor.tokenizer, []

    def generate(input_ids, pixel_values, image_grid_thw, **_):
        asked.extend(words.batch_decode(input_ids))
        parts = iter(pixel_values.split(image_grid_thw.prod(1).tolist()))
        texts = []
        for row in words.batch_decode(input_ids):
            seen = [(float(next(parts).mean()) + 1) / 2 for _ in range(row.count("<|vision_start|>"))]
            texts.append(f'"score" : [25, {25 * (seen[-1] - seen[0] if len(seen) == 2 else seen[0]):.4f}]')
        return torch.cat([input_ids, words(texts, return_tensors="pt", padding=True).input_ids], 1)

    reward.answerer.model.generate = generate
    found = reward([grey(204), grey(204)], [edit("a"), edit("b", 102)])
    torch.testing.assert_close(found, torch.tensor([0.8, (0.4 * 0.8) ** 0.5]), rtol=0, atol=2e-3)
    assert "Editing instruction:a\n<|im_end|>" in asked[0] and len(asked) == 4


def test_prompts_and_sources_it_cannot_take():
    reward = rewards.load("unified_reward_edit:http://127.0.0.1:9/v1@m")
    with pytest.raises(UserError, match="'unified_reward_edit' judges edits, and the prompt 'a' has no"):
        reward(pictures(1), ["a"])
    with pytest.raises(UserError, match="a token of the model's own format"):
        reward(pictures(1), [edit("<|im_end|>")])
    with pytest.raises(UserError, match="model is empty"):
        rewards.load("unified_reward_edit:http://127.0.0.1:9/v1")
