"""Soft-TIFA, GenEval 2's scores: a tiny random Qwen2-VL is asked, and the means are taken by hand."""

import json
import math
from argparse import Namespace

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from diffalign import rewards
from diffalign.cli.evaluate import named_rewards
from diffalign.errors import UserError
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.registry import with_prompts
from diffalign.rewards.scoring.cache import reward_key
from diffalign.rewards.zoo.geneval2_questions import read_questions
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.rewards.conftest import write_jsonl
from tests.rewards.tiny_qwen import answering, make_base, make_processor, quiet, random_model

ROWS = [
    {
        "prompt": "two green cats",
        "atom_count": 3,
        "vqa_list": [["How many cats are in the image?", "two"], ["Are the cats green?", "Yes"],
                     ["Are there any cats in the image?", "Yes"]],
        "skills": ["count", "attribute", "object"],
    },
    {
        "prompt": "a dog",
        "atom_count": 1,
        "vqa_list": [["How many dogs are in the image?", "one"], ["Are there any dogs in the image?", "Yes"]],
        "skills": ["count", "object"],
    },
]  # fmt: skip
PROMPTS = [row["prompt"] for row in ROWS]
TOKENS = {
    "Yes": ["Yes", "yes", "ĠYes"],  # " yes" is three tokens, and does not count
    "two": ["Ġtwo", "ĠTwo", "2"],
    "one": ["1"],  # no word is one token
}
"""By answer, the spellings that are one token of the tokenizer that is made here; Ġ is a space."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("qwen"), whole="yes two Two Yes")
    processor = make_processor(folder)
    network = quiet(random_model(folder, std=0.2))
    for question, token in ((ROWS[0]["vqa_list"][1][0], "yes"), (ROWS[1]["vqa_list"][0][0], "1")):
        inputs = processor(
            text=[asked(question)], images=[pictures(1)[0].convert("RGB")], return_tensors="pt"
        )
        answering(network, inputs, processor.tokenizer.convert_tokens_to_ids(token))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "geneval2_data.jsonl", ROWS)


def asked(question):
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"<|image_pad|><|vision_end|>{question} Answer in one word.<|im_end|>\n<|im_start|>assistant\n"
    )


@torch.no_grad()
def by_hand(folder, processor, image, prompt):
    """Return the probability of the right answer to each question, one forward pass of transformers each."""
    network = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    found = []
    for question, answer in next(row["vqa_list"] for row in ROWS if row["prompt"] == prompt):
        inputs = processor(text=[asked(question)], images=[image.convert("RGB")], return_tensors="pt")
        said = network(**inputs).logits[0, -1].softmax(-1)
        found.append(said[processor.tokenizer.convert_tokens_to_ids(TOKENS[answer])].sum().item())
    return found


def test_means_of_the_right_answers(model, questions):
    am, gm = (rewards.load(f"geneval2_{mean}:{model}@questions={questions}") for mean in ("am", "gm"))
    processor = am.reader.processor
    for answer, tokens in TOKENS.items():
        assert sorted(am.tokens[answer]) == sorted(processor.tokenizer.convert_tokens_to_ids(tokens))
    images, prompts = pictures(4), some(PROMPTS, 4)
    each = [by_hand(model, processor, *pair) for pair in zip(images, prompts, strict=True)]
    assert max(map(max, each)) > 0.1 and min(map(min, each)) < 0.05  # so that the means differ
    close = {"rtol": 1e-4, "atol": 1e-6}
    arithmetic = torch.tensor([sum(ps) / len(ps) for ps in each])
    geometric = torch.tensor([math.prod(ps) ** (1 / len(ps)) for ps in each])
    torch.testing.assert_close(am(images, prompts), arithmetic, **close)
    torch.testing.assert_close(gm(images, prompts), geometric, **close)
    counts = [ps[0] for ps in each]
    attributes = [ps[1] for ps in each[::2]]
    objects = [ps[-1] for ps in each]
    skills = am.by_skill(images, prompts)
    assert skills == pytest.approx(
        {"count": sum(counts) / 4, "attribute": sum(attributes) / 2, "object": sum(objects) / 4}, rel=1e-4
    )


@covers("geneval2_am", "geneval2_gm")
@pytest.mark.parametrize("mean", ["am", "gm"])
def test_it_keeps_to_what_rewards_keep_to(mean, model, questions):
    reward = rewards.load(f"geneval2_{mean}:{model}@questions={questions}")
    conforms(
        reward, PROMPTS, tolerance=0.01, differentiable=rewards.REGISTRY[f"geneval2_{mean}"].differentiable
    )


def test_bfloat16(model, questions):
    # 0.9 of VQAScore, whose one answer has the probability 1/2: here two of three answers hardly have any
    assert_bfloat16_keeps_the_order(f"geneval2_am:{model}@questions={questions}", PROMPTS, 0.8)


def test_a_source_beside_the_prompt_changes_nothing(model, questions):
    reward = rewards.load(f"geneval2_am:{model}@questions={questions}")
    image = pictures(1)
    assert reward(image, [SourcedPrompt("a dog", b"no image")]) == reward(image, ["a dog"])


def test_prompts_without_questions_are_counted(model, questions, tmp_path):
    reward = rewards.load(f"geneval2_am:{model}@questions={questions}")
    told = (
        r"2 of 3 prompts have no questions in .*geneval2_data.jsonl, such as 'a cow'; allowed: its 2 prompts"
    )
    with pytest.raises(UserError, match=told):
        reward.check_prompts(["a cow", "a dog", "a cow", "a pig"])
    with pytest.raises(UserError, match=r"1 of 1 prompts .*'a cow'.*questions=FILE"):
        reward(pictures(1), ["a cow"])
    half = write_jsonl(tmp_path / "half.jsonl", [ROWS[0], {"prompt": "a dog", "atom_count": 1}])
    with pytest.raises(UserError, match=r"1 of 2 prompts .*'a dog'"):
        rewards.load(f"geneval2_am:{model}@questions={half}").check_prompts(PROMPTS)


def test_the_copy_of_the_prompts_holds_the_questions(questions):
    copy = f"geneval2:{questions}"
    assert with_prompts("geneval2_am", copy) == f"geneval2_am:questions={questions}"
    assert with_prompts("geneval2_gm:Q/VL", copy) == f"geneval2_gm:Q/VL@questions={questions}"
    for spec, prompts in (
        ("geneval2_am:questions=other.jsonl", copy), ("geneval2_am", "geneval2"),
        ("geneval2_am", "parti:x.tsv"), ("vqascore", copy),
    ):  # fmt: skip
        assert with_prompts(spec, prompts) == spec
    with pytest.raises(UserError, match=r"'a@b\.jsonl': allowed: a path without '@'"):
        with_prompts("geneval2_am", "geneval2:a@b.jsonl")


def test_evaluate_gives_the_reward_the_copy(model, questions):
    args = Namespace(prompts=f"geneval2:{questions}", device="cpu", batch_size=3)
    named = named_rewards([f"geneval2_am:{model}", f"geneval2_gm:{model}"], args)
    assert [one.name for one in named] == ["geneval2_am", "geneval2_gm"]
    image, prompt = pictures(1), PROMPTS[:1]
    expected = rewards.load(f"geneval2_gm:{model}@questions={questions}")(image, prompt)
    torch.testing.assert_close(named[1].load()(image, prompt), expected, rtol=1e-5, atol=1e-6)


def test_other_questions_are_another_reward(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    before = reward_key(f"geneval2_am:questions={file}")
    write_jsonl(file, ROWS[:1])
    assert reward_key(f"geneval2_am:questions={file}") != before


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"vqa_list": []}, r"line 1: vqa_list is '\[\]'; allowed: \[\[question, answer\], ...\]"),
        ({"vqa_list": [["Is it?"]]}, r"allowed: \[question, answer\], of texts"),
        ({"vqa_list": [["Is it?", "No"]]}, r"the answer to 'Is it\?' is 'No'; allowed: Yes"),
        ({"vqa_list": [["How many?", "11"]]}, "is '11'; allowed: one, two, .*ten"),
        ({"vqa_list": [["Is it?", "Yes"]], "skills": []}, "vqa_list has 1 questions; allowed: a skill for"),
        ({}, "has 1 rows and no questions; needed in a row"),
    ],
)
def test_malformed_questions(row, told, tmp_path):
    file = write_jsonl(tmp_path / "q.jsonl", [{"prompt": "a cat", **row}])
    with pytest.raises(UserError, match=told):
        read_questions("geneval2_am", str(file))


def test_a_prompt_has_one_list(tmp_path):
    row = {"prompt": "a cat", "vqa_list": [["Is it?", "Yes"]]}
    file = write_jsonl(tmp_path / "q.jsonl", [row, row])
    assert len(read_questions("geneval2_am", str(file))[0]) == 1
    write_jsonl(file, [row, {**row, "vqa_list": [["Are they?", "Yes"]]}])
    with pytest.raises(UserError, match="line 2: 'a cat' has other questions in a row before"):
        read_questions("geneval2_am", str(file))


def test_questions_are_fetched_or_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"read as geneval2_gm:questions=FILE: .*cannot fetch"):
        read_questions("geneval2_gm", "")
    kept = tmp_path / "diffalign" / "geneval2" / "geneval2_data.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_questions("geneval2_gm", "")[0]) == PROMPTS
    with pytest.raises(UserError, match=r"reward 'geneval2_gm'.*no such file"):
        read_questions("geneval2_gm", str(tmp_path / "none.jsonl"))


def test_a_model_that_writes_no_answer_as_one_token(model, tmp_path):
    row = {"prompt": "ten cats", "vqa_list": [["How many cats are in the image?", "ten"]]}
    file = write_jsonl(tmp_path / "q.jsonl", [row])
    with pytest.raises(UserError, match=r"writes none of 'ten', 'Ten', '10', .* as one token"):
        rewards.load(f"geneval2_am:{model}@questions={file}")
