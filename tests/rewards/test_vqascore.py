"""VQAScore: tiny random models of two real classes, whose processors are made here."""

import json

import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLForConditionalGeneration,
)

from diffalign import rewards
from diffalign.errors import UserError
from tests.rewards.conformance import assert_bfloat16_keeps_the_order, conforms, covers, pictures, some
from tests.rewards.tiny_qwen import answering, make_base, make_processor, quiet, random_model

PROMPTS = ["a red cat", 'a "quoted" {thing}, in a prompt that is far longer than the others']
QUESTION = 'Does this figure show "{}"? Please answer Yes or No.'
LLAVA_CHAT = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return a Qwen2-VL: "Yes" follows a new line, and is one token."""
    folder = make_base(tmp_path_factory.mktemp("qwen"))
    processor = make_processor(folder)
    model = quiet(random_model(folder, std=0.2))
    text = asked_of_qwen(PROMPTS[0])
    inputs = processor(text=[text], images=[pictures(1)[0].convert("RGB")], return_tensors="pt")
    answering(model, inputs, processor.tokenizer.convert_tokens_to_ids("Yes"))
    model.save_pretrained(folder)
    return folder


def asked_of_qwen(prompt):
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"<|image_pad|><|vision_end|>{QUESTION.format(prompt)}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """Return a LLaVA: "Yes" follows a colon, so a space belongs to it: two tokens here."""
    folder = tmp_path_factory.mktemp("llava")
    letters = sorted({c for text in (QUESTION, LLAVA_CHAT, *PROMPTS) for c in text} - {" "})
    names = ["<unk>", "<s>", "</s>", "▁", *letters, "▁Y", "es"]
    names += [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    words = LlamaTokenizer(vocab=vocab, merges=[("▁", "Y"), ("e", "s")], add_bos_token=True)
    words.add_tokens(["<image>"], special_tokens=True)
    words.pad_token = "</s>"
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28,
        patch_size=7, projection_dim=32,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )  # fmt: skip
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes), words, patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=LLAVA_CHAT,
    )  # fmt: skip
    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    image, question = pictures(1)[0].convert("RGB"), asked_of_llava(PROMPTS[0])
    quiet(model)
    for text, token in ((question, "▁Y"), (f"{question} Y", "es")):
        answering(model, processor(text=[text], images=[image], return_tensors="pt"), vocab[token])
    model.save_pretrained(folder)
    return folder


def asked_of_llava(prompt):
    return f"USER: <image>\n{QUESTION.format(prompt)} ASSISTANT:"


@pytest.fixture(scope="module")
def reward(qwen):
    return rewards.load(f"vqascore:{qwen}")


def test_qwen_answers_after_its_template(reward, qwen):
    """P("Yes") at the first generated position, one image at a time, by transformers' own classes."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(qwen, dtype="float32").eval()
    images, prompts = pictures(4), some(PROMPTS, 4)
    wanted = []
    for image, prompt in zip(images, prompts, strict=True):
        inputs = reward.reader.processor(
            text=[asked_of_qwen(prompt)], images=[image.convert("RGB")], return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs).logits[0, -1]
        wanted.append(logits.softmax(-1)[reward.reader.processor.tokenizer.convert_tokens_to_ids("Yes")])
    torch.testing.assert_close(reward(images, prompts), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    assert reward.answer.text == "Yes" and len(reward.answer.tokens) == 1
    assert min(wanted) > 0.01 and max(wanted) < 0.99


def test_llava_answers_in_two_tokens(llava):
    """The product of P("▁Y") and P("es" after it)."""
    reward = rewards.load(f"vqascore:{llava}")
    assert reward.answer.text == " Yes" and len(reward.answer.tokens) == 2
    images, prompts = pictures(4), some(PROMPTS, 4)
    wanted = [
        answered_by_llava(reward.reader.processor, llava, *pair) for pair in zip(images, prompts, strict=True)
    ]
    torch.testing.assert_close(reward(images, prompts), torch.stack(wanted), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def answered_by_llava(processor, folder, image, prompt):
    """By transformers' own way from a conversation to tokens."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32").eval()
    parts = [
        {"type": "image", "image": image.convert("RGB")},
        {"type": "text", "text": QUESTION.format(prompt)},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    whole, said = inputs.input_ids, 1.0
    assert (whole == processor.tokenizer.bos_token_id).sum() == 1
    for token in processor.tokenizer.convert_tokens_to_ids(["▁Y", "es"]):
        logits = model(input_ids=whole, pixel_values=inputs.pixel_values).logits[0, -1]
        said = said * logits.softmax(-1)[token]
        whole = torch.cat([whole, torch.tensor([[token]])], 1)
    return said


@covers("vqascore")
@pytest.mark.parametrize("model", ["qwen", "llava"])
def test_it_keeps_to_what_rewards_keep_to(model, request):
    reward = rewards.load(f"vqascore:{request.getfixturevalue(model)}")
    conforms(reward, PROMPTS, tolerance=0.01, differentiable=rewards.REGISTRY["vqascore"].differentiable)


def copied(folder, there, chat):
    for file in folder.iterdir():
        (there / file.name).write_bytes(file.read_bytes())
    (there / "chat_template.jinja").write_text(chat)
    return there


def test_a_template_that_begins_the_text_does_so_once(llava, tmp_path):
    reward = rewards.load(f"vqascore:{copied(llava, tmp_path, '<s>' + LLAVA_CHAT)}")
    image = pictures(1)[0]
    wanted = answered_by_llava(reward.reader.processor, llava, image, PROMPTS[0])
    torch.testing.assert_close(reward([image], PROMPTS[:1])[0], wanted, rtol=1e-4, atol=1e-6)


def test_bfloat16(qwen):
    assert_bfloat16_keeps_the_order(f"vqascore:{qwen}", PROMPTS, 0.9)


@pytest.mark.parametrize(
    ("model", "prompt"), [("qwen", "a <|image_pad|>"), ("llava", "an <image> of it"), ("llava", " ")]
)
def test_prompts_it_cannot_read(model, prompt, request):
    reward = rewards.load(f"vqascore:{request.getfixturevalue(model)}")
    with pytest.raises(UserError, match=r"reward 'vqascore': (the prompt .* holds|an empty prompt)"):
        reward(pictures(1), [prompt])


def test_other_models_are_refused(qwen, llava, clip_folder, tmp_path):
    def refused(source, reason):
        with pytest.raises(UserError, match=reason):
            rewards.load(f"vqascore:{source}" if source else "vqascore")

    refused("", "cannot load the vision-language model of 'Qwen/Qwen2-VL-7B-Instruct'.*HF_HUB_OFFLINE")
    refused(tmp_path, "cannot load the vision-language model of")
    refused(clip_folder, "cannot load the vision-language model of")
    (copied(llava, tmp_path, "") / "chat_template.jinja").unlink()
    refused(tmp_path, "cannot load the chat template of")
    (tmp_path / "chat_template.jinja").write_text(LLAVA_CHAT)
    config = json.loads((llava / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, "is not a whole vision-language model: 9 weights are missing")
