"""VisionReward's checklist: its published files, and a tiny random Qwen2-VL that answers."""

import hashlib
import json

import numpy as np
import pytest
import torch

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.checklist_questions import ALIGNMENT, BODY, FACE, HANDS, ITEMS
from tests.rewards.conformance import conforms, covers, pictures, some
from tests.rewards.tiny_qwen import make_base, make_processor, random_model

PROMPTS = ["a red cat", 'a "quoted" {thing}, in a prompt that is far longer than the others']
QUESTIONS = [BODY, FACE, HANDS, *(item.question for item in ITEMS)]
MASKS = {0: [22, 23, 24, 28, 29], 1: [25, 26], 2: [27]}  # of the repository's inference-image.py


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("qwen"))
    make_processor(folder)
    random_model(folder, seed=4, std=0.25).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(qwen):
    return rewards.load(f"checklist:{qwen}")


def yes_of(reward, image, question):
    """Return the probability of Yes against No at the next token, by transformers' own classes."""
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"<|image_pad|><|vision_end|>{question} Please answer Yes or No.<|im_end|>\n<|im_start|>assistant\n"
    )
    processor = reward.reader.processor
    inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
    with torch.no_grad():
        logits = reward.reader.model(**inputs).logits[0, -1].double().numpy()
    yes, no = (processor.tokenizer(word).input_ids[0] for word in ("Yes", "No"))
    return 1 / (1 + np.exp(logits[no] - logits[yes]))


def published(yes, shown):
    """Return the score of 30 answers, 1 or -1, and of the alignment, as the repository's code has it."""
    answers = [1 if value >= 0.5 else -1 for value in yes]
    for mask, features in MASKS.items():
        for feature in features:
            answers[feature] *= int(answers[mask] > 0)
    weights = [ALIGNMENT, *(item.weight for item in ITEMS)]
    return float(np.dot([shown, *(v for i, v in enumerate(answers) if i not in MASKS)], weights))


def test_scores_are_the_published_formula(reward, qwen):
    images = pictures(2)
    soft, hard = reward(images, PROMPTS), rewards.load(f"checklist:{qwen}@hard=yes")(images, PROMPTS)
    gates = 0
    for row, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True)):
        yes = [yes_of(reward, image, question) for question in QUESTIONS]
        shown = yes_of(reward, image, f'Does this figure show "{prompt}"?')
        assert hard[row].item() == pytest.approx(published(yes, shown), abs=1e-4)
        # the expectation of the published score: answers are independent, so their probabilities multiply
        gate_of = {feature: mask for mask, features in MASKS.items() for feature in features}
        expected = ALIGNMENT * shown + sum(
            item.weight * (2 * yes[i] - 1) * (yes[gate_of[i]] if i in gate_of else 1)
            for i, item in enumerate(ITEMS, 3)
        )
        assert soft[row].item() == pytest.approx(expected, abs=1e-4)
        gates += sum(value >= 0.5 for value in yes[:3])
    assert 0 < gates < 6 and (soft - hard).abs().min() > 0.01


def test_it_is_the_expectation_of_random_answers(reward):
    random, image = np.random.default_rng(0), pictures(1)[0]
    yes = np.array([yes_of(reward, image, question) for question in QUESTIONS])
    shown = yes_of(reward, image, f'Does this figure show "{PROMPTS[0]}"?')
    draws = [published((random.random(30) < yes).astype(float), shown) for _ in range(4000)]
    assert reward([image], PROMPTS[:1]).item() == pytest.approx(np.mean(draws), abs=4 * np.std(draws) / 63)


def test_the_questions_and_weights_are_the_published_ones():
    """Digests of VisionReward_image_qa_select.txt, stripped, and of the "coef" of weight_select.json."""
    digest = hashlib.sha256("\n".join(QUESTIONS).encode()).hexdigest()
    assert digest == "b612d40e73f55f21536925df3cdd30b534f0ce78e606146b0589d750e173965e"
    weights = json.dumps([ALIGNMENT, *(item.weight for item in ITEMS)])
    digest = hashlib.sha256(weights.encode()).hexdigest()
    assert digest == "ba08d09f0f7f53dbfc13cd2b2eb653598a323ac084366a0c8964bacd111365cd"
    card, rest = rewards.REGISTRY["checklist"], sum(item.weight for item in ITEMS)
    assert (card.low, card.high) == pytest.approx((-rest, ALIGNMENT + rest), abs=0.05)


@covers("checklist")
def test_it_keeps_to_what_rewards_keep_to(reward, monkeypatch):
    """With a few of its questions, one behind a gate: each is a forward pass."""
    monkeypatch.setattr("diffalign.rewards.zoo.checklist.ITEMS", ITEMS[::8])
    assert any(item.gate for item in ITEMS[::8])
    spread = reward(pictures(), some(PROMPTS, 6)).std().item()
    conforms(reward, PROMPTS, tolerance=spread / 5, differentiable=True)


def test_what_is_refused(reward, qwen, monkeypatch):
    with pytest.raises(UserError, match="reward 'checklist': an empty prompt"):
        reward(pictures(1), [" "])
    with pytest.raises(UserError, match="hard=maybe must be yes or no"):
        rewards.load(f"checklist:{qwen}@hard=maybe")
    with pytest.raises(UserError, match=r"cannot load the vision-language model of 'Qwen/Qwen2\.5"):
        rewards.load("checklist")
