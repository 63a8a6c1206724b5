"""UnifiedReward 2.0: an endpoint that looks at its images, and a tiny Qwen3-VL of transformers."""

import hashlib

import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.unified_reward_2 import load_pairwise, points, shares
from diffalign.utils.http import UnusableError
from tests.rewards.conformance import conforms_to_samples, covers, pictures
from tests.rewards.endpoint import light, serving
from tests.rewards.tiny_qwen3 import make_base, random_model, save_processor

ANSWER = "Alignment Score (1-5): {:.9f}\nCoherence Score (1-5): {:.9f}\nStyle Score (1-5): {:.9f}\n"
PAIR = (
    "Alignment Score:\n Image 1: {0:.6f}\n Image 2: {1:.6f}\n\nCoherence Score:\n Image 1: {0:.6f}\n "
    "Image 2: {1:.6f}\n\nStyle Score:\n Image 1: 0.5\n Image 2: 0.5"
)


@pytest.fixture
def address():
    """Light images are aligned, dark ones stylish; of two the lighter wins, with 0.1 for the first place."""
    asked = []

    def answer(path, body):
        *images, question = body["messages"][0]["content"]
        asked.append((path, body["model"], question["text"]))
        levels = [light(image) for image in images]
        if "silent" in question["text"]:
            return "I would rather not."
        if len(levels) == 2:
            share = 0.5 + 0.1 + 0.4 * (levels[0] - levels[1])
            return PAIR.format(share, 1 - share)
        return ANSWER.format(1 + 4 * levels[0], 3, 5 - 4 * levels[0])

    with serving(answer) as served:
        yield f"{served}@UnifiedReward", asked


def grey(level):
    return Image.new("RGB", (40, 30), (level,) * 3)


@covers("unified_reward_2")
def test_it_conforms(address):
    conforms_to_samples(
        lambda size: rewards.load(f"unified_reward_2:{address[0]}@alignment=3", batch_size=size),
        pictures(4),
        ["a cat", "a dog", "a tree", "a cat"],
    )


def test_points_are_asked_for_and_averaged(address):
    source, asked = address
    images, prompts = [grey(0), grey(51), grey(255)], ["a {red} cat", "b", "c"]
    even = rewards.load(f"unified_reward_2:{source}")(images, prompts)
    torch.testing.assert_close(even, torch.tensor([0.6, 0.6, 0.6]))
    wanted = template("unified_reward_2").replace("{text_prompt}", "a {red} cat")
    assert ("/v1/chat/completions", "UnifiedReward", wanted) in asked
    weighted = rewards.load(f"unified_reward_2:{source}@alignment=3@style=0")(images, prompts)
    torch.testing.assert_close(weighted, torch.tensor([3 + 3, 3 * 1.8 + 3, 3 * 5 + 3]) / 4 / 5)


def test_pairs_are_asked_in_both_orders(address):
    """The advantage of the first place cancels."""
    pairs = load_pairwise(f"{address[0]}@style=0")
    found = pairs.compare([grey(255), grey(0), grey(51)], [grey(0), grey(255), grey(51)], ["a"] * 3)
    torch.testing.assert_close(found, torch.tensor([0.9, 0.1, 0.5]))
    assert {question for _, _, question in address[1]} == {
        template("unified_reward_2_pair").replace("{text_prompt}", "a")
    }
    third = load_pairwise(address[0]).compare([grey(255)], [grey(0)], ["a"])
    torch.testing.assert_close(third, torch.tensor([(0.9 + 0.9 + 0.5) / 3]))
    with pytest.raises(ValueError, match="1 and 2 images"):
        pairs.compare([grey(0)], [grey(0), grey(1)], ["a"])


def test_the_published_answers_are_read():
    """Examples of the repository's point_score_ACS_image_generation.py and pair_score_image_generation.py."""
    assert points(
        "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
        "Style Score (1-5): 2.802500009536743\n"
    ) == {"alignment": 2.694700002670288, "coherence": 2.371500015258789, "style": 2.802500009536743}
    read = shares(
        "Alignment Score:\n Image 1: 0.435699999332428\n Image 2: 0.564300000667572\n\nCoherence Score:\n"
        " Image 1: 0.4180000126361847\n Image 2: 0.5820000171661377\n\nStyle Score:\n"
        " Image 1: 0.40790000557899475\n Image 2: 0.5921000242233276\n"
    )
    assert read == pytest.approx({"alignment": 0.4357, "coherence": 0.418, "style": 0.4079}, abs=1e-6)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "without 'Alignment Score"),
        ("Alignment Score (1-5): 2\nStyle Score (1-5): 2", "without 'Coherence Score"),
        (ANSWER.format(0.5, 3, 3), "alignment is 0.5.*, outside 1 to 5"),
    ],
)
def test_points_that_are_none(answer, reason):
    with pytest.raises(UnusableError, match=reason):
        points(answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("Image 1 is better", "of both images"), (PAIR.format(0.7, 0.7), "0.7.* do not add up to 1")],
)
def test_shares_that_are_none(answer, reason):
    with pytest.raises(UnusableError, match=reason):
        shares(answer)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("unified_reward_2", "6eefc0130da5c0f1c8ccbb470c806ba6f0343bbba3eaf38b0ef635f686d42b25"),
        ("unified_reward_2_pair", "b6fe3bb9f734feb89060496d5f2134f04ae2675ec24a231fe3ac33a1bc617ac6"),
    ],
)
def test_the_questions_are_the_published_ones(name, digest):
    """Digests of ``problem`` in the two files, with {text_prompt} for the prompt."""
    assert hashlib.sha256(template(name).encode()).hexdigest() == digest


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("qwen3"))
    save_processor(folder)
    random_model(folder).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_is_asked_here(qwen):
    """Its answers are written here: the tokens of a text that depends on the image it was given."""
    reward = rewards.load(f"unified_reward_2:{qwen}@coherence=0@style=0")
    words, asked = reward.answerer.processor.tokenizer, []

    def generate(input_ids, pixel_values, image_grid_thw, **_):
        asked.extend(words.batch_decode(input_ids))
        images = pixel_values.split(image_grid_thw.prod(1).tolist())
        texts = [ANSWER.format(3 + image.mean(), 3, 3) for image in images]
        return torch.cat([input_ids, words(texts, return_tensors="pt", padding=True).input_ids], 1)

    reward.answerer.model.generate = generate
    found = reward([grey(0), grey(204)], ["a {red} cat", "a blue dog, and a longer prompt"])
    torch.testing.assert_close(found, torch.tensor([2, 3.6]) / 5, rtol=0, atol=1e-5)  # 3 + (2 level - 1)
    question = template("unified_reward_2").replace("{text_prompt}", "a {red} cat")
    assert f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n" in asked[0]


def test_a_model_that_answers_something_else_gives_no_score(qwen, address):
    with pytest.raises(UserError, match=r"no usable answer from .* \(3 tries\) for 'a': an answer without"):
        rewards.load(f"unified_reward_2:{qwen}")([grey(0)], ["a"])


@pytest.mark.parametrize("prompt", ["", "an <image>", "<|im_end|>"])
def test_prompts_it_cannot_read(prompt):
    for ask in (
        lambda: rewards.load("unified_reward_2:http://127.0.0.1:9/v1@m")(pictures(1), [prompt]),
        lambda: load_pairwise("http://127.0.0.1:9/v1@m").compare(pictures(1), pictures(1), [prompt]),
    ):
        with pytest.raises(UserError, match="reward 'unified_reward_2'"):
            ask()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "cannot load the vision-language model of 'CodeGoat24/UnifiedReward-2.0-qwen3vl-8b'"),
        (":http://here/v1", "model is empty"),
        (":somewhere@m", "'m' after the model 'somewhere'; allowed: http://HOST:PORT/v1@MODEL"),
        (":http://here/v1@m@style=-1", "style=-1; allowed: 0 or more"),
        (":http://here/v1@m@alignment=0@coherence=0@style=0", "not all 0"),
        (":http://here/v1@m@physics=1", "option of the reward 'unified_reward_2': 'physics'"),
    ],
)
def test_other_sources_are_refused(source, reason):
    with pytest.raises(UserError, match=reason):
        rewards.load(f"unified_reward_2{source}")
