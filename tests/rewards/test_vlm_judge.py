"""A vision-language judge with a custom question: points, rubrics, pairs in both orders."""

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.vlm_answers import Asked, Local, Unread
from diffalign.rewards.zoo.vlm_judge import (
    PairwiseJudge,
    Question,
    VLMJudge,
    load_pairwise,
    points,
    winner,
)
from diffalign.utils.http import UnusableError
from tests.rewards.conformance import conforms_to_samples, covers, pictures
from tests.rewards.tiny_qwen import CHAT, make_base, make_tokenizer, random_model


def light(content):
    data = base64.b64decode(content["image_url"]["url"].partition("base64,")[2])
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).mean())


@pytest.fixture
def address():
    """Light images get more points; of two the lighter wins, and of near ones the first that is shown."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            *images, question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][
                0
            ]["content"]
            levels = [light(image) for image in images]
            if len(levels) == 2:
                near = abs(levels[0] - levels[1]) < 5
                text = "Both are fine.\nA" if near or levels[0] > levels[1] else "Both are fine.\n**B**"
            else:
                text = f"It has 3 things.\nScore: {1 + 9 * levels[0] / 255:.4f}"
            if "silent" in question["text"]:
                text = "I would rather not."
            body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def written(folder, address, **fields):
    file = folder / "judge.yaml"
    data = {"url": address, "model": "vlm", "prompt": "How good is '{prompt}'?", **fields}
    file.write_text(json.dumps(data))  # JSON is YAML
    return file


@covers("vlm_judge")
def test_it_conforms(tmp_path, address):
    file = written(tmp_path, address)
    conforms_to_samples(
        lambda size: rewards.load(f"vlm_judge:{file}", batch_size=size), pictures(4), ["a", "b", "c", "a"]
    )


def test_points_are_brought_to_one(tmp_path, address):
    reward = rewards.load(f"vlm_judge:{written(tmp_path, address)}")
    images = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 51, 255)]
    torch.testing.assert_close(reward(images, ["a"] * 3), torch.tensor([0, 0.2, 1.0]), rtol=0, atol=1e-4)


def test_answers_by_hand():
    assert points("7 of 10 things; so 4", 1, 10, {}) == pytest.approx(3 / 9)
    rubric = {"Composition": 1.0, "prompt fit": 3.0}
    answer = "composition: 6\n**Prompt fit**: 11 is too much? no:\n"
    with pytest.raises(UnusableError, match="prompt fit is 11, outside 1 to 10"):
        points(answer, 1, 10, rubric)
    assert points("- Composition: 10\n- **prompt fit**: 4", 1, 10, rubric) == pytest.approx(
        (1 + 3 * 3 / 9) / 4
    )
    for text in ("nothing", "12", "v2"):
        with pytest.raises(UnusableError):
            points(text, 1, 10, {})
    assert [winner(text) for text in ("A", "so\nB.", "Tie", "The better image: A", "Answer: **B**")] == [
        1,
        0,
        0.5,
        1,
        0,
    ]
    with pytest.raises(UnusableError, match="none of A, B, tie"):
        winner("both")


def test_pairs_are_asked_in_both_orders(tmp_path, address):
    judge = load_pairwise(str(written(tmp_path, address, prompt="Which shows {prompt}, A or B?")))
    dark, bright, brighter = (Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200, 202))
    found = judge.compare([bright, dark, bright, brighter], [dark, bright, brighter, bright], ["a"] * 4)
    assert found.tolist() == [1, 0, 0.5, 0.5], "who wins by place alone has not won"
    with pytest.raises(ValueError, match="1 and 2 images"):
        judge.compare([dark], [dark, dark], ["a"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "localhost"}, "http://"),
        ({"prompt": 3}, "prompt is 3"),
        ({"low": 5, "high": 5}, "low below high"),
        ({"criteria": {"look": 0}}, "criteria.look is 0"),
        ({"criteria": []}, "weights by name"),
        ({"side": 0}, "side is 0"),
        ({"tempo": 1}, "tempo"),
        ({"path": "here"}, "both path and url"),
        ({"tokens": 5}, "tokens with url"),
        ({"prompt": {"a": 1}}, "texts by name"),
        (
            {"prompt": {"a": "?", "b": "?"}, "criteria": {"a": 1, "c": 2}},
            "weights for a, c; allowed: .* a, b",
        ),
    ],
)
def test_bad_files(tmp_path, address, fields, words):
    with pytest.raises(UserError, match=words):
        rewards.load(f"vlm_judge:{written(tmp_path, address, **fields)}")


class Scripted(Local):
    """A model whose answers are a function of (images, text), and what it was asked, call by call."""

    def __init__(self, answer, at_once=2):
        tokenizer = type("Words", (), {"added_tokens_decoder": {}, "all_special_tokens": ["<|end|>"]})
        super().__init__(None, type("P", (), {"tokenizer": tokenizer}), "here", Unread("mine"), 8, at_once)
        object.__setattr__(self, "answer", answer)
        object.__setattr__(self, "calls", [])

    def answers(self, asked):
        self.calls.append([one.text for one in asked])
        return [self.answer(one.images, one.text) for one in asked]


def level(image):
    return np.asarray(image.convert("RGB"))[0, 0, 0]


def greys(*levels):
    return [Image.new("RGB", (8, 8), (value,) * 3) for value in levels]


def test_an_answer_that_cannot_be_read_is_counted_and_asked_for_again(caplog):
    """Only its question is, with what was wrong; the scores are in the order of the images."""

    def answer(images, text):
        value = level(images[0])
        return "no idea" if value == 20 and "could not be used" not in text else f"{value} of 100"[:2]

    model = Scripted(answer)
    judge = VLMJudge(Question("mine", model, {"": "How good is {prompt}?"}, 0, 100))
    torch.testing.assert_close(judge(greys(10, 20, 30), ["a", "b", "c"]), torch.tensor([0.1, 0.2, 0.3]))
    again = "How good is b?\n\nAn answer before could not be used: an answer without a number."
    assert model.calls == [["How good is a?", "How good is b?"], ["How good is c?"], [again]]
    assert (model.unread.answers, model.unread.unread) == (4, 1)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "'mine': 1 of 2 answers so far could not be read" in told[0]


def test_what_is_never_answered_is_an_error_and_no_score(caplog):
    silent = Scripted(lambda images, text: "hm" if level(images[0]) < 50 else "7", at_once=16)
    judge = VLMJudge(Question("mine", silent, {"": "?"}))
    with pytest.raises(UserError, match=r"'mine': no usable answer from 'here' \(3 tries\) for 'b': an "
                       r"answer without a number; 2 of 3 questions have none"):  # fmt: skip
        judge(greys(60, 20, 30), ["a", "b", "c"])
    assert silent.unread.unread == 6 and len(caplog.records) == 1  # the next is said at the tenth
    with pytest.raises(UserError, match=r"holds '<\|end\|>', a token of the model's own format"):
        judge(greys(60), ["a <|end|>"])


def test_a_rubric_of_several_questions_is_their_mean_by_weight():
    model = Scripted(lambda images, text: "3" if text == "Fit of a?" else "9")
    questions = {"fit": "Fit of {prompt}?", "look": "Look?"}
    plain = VLMJudge(Question("mine", model, questions, 1, 9))
    assert plain(greys(1), ["a"]).tolist() == pytest.approx([(2 / 8 + 1) / 2])
    weighted = VLMJudge(Question("mine", model, questions, 1, 9, {"fit": 3.0, "look": 1.0}))
    assert weighted(greys(1, 2), ["a", "a"]).tolist() == pytest.approx([(3 * 2 / 8 + 1) / 4] * 2)


def test_the_place_of_an_image_cancels_in_the_mean_of_both_orders():
    """The first place wins unless the other image is much lighter; near ones may be called a tie."""

    def answer(images, text):
        first, second = (int(level(image)) for image in images)
        return "B" if second > first + 50 else "tie" if second == first + 50 else "A"

    judge = PairwiseJudge(Question("mine", Scripted(answer), {"": "A or B for {prompt}?"}))
    found = judge.compare(greys(100, 10, 10, 60, 10), greys(10, 100, 20, 10, 60), ["a"] * 5)
    assert found.tolist() == [1.0, 0.0, 0.5, 0.75, 0.25]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Return the folder of a random Qwen2-VL whose head can say digits alone."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    folder = make_base(tmp_path_factory.mktemp("qwen"))
    words = make_tokenizer(folder)
    pixels = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    Qwen2VLProcessor(pixels, words, Qwen2VLVideoProcessor(), chat_template=CHAT).save_pretrained(folder)
    model = random_model(folder, std=0.3)
    digits = words.convert_tokens_to_ids([str(number) for number in range(1, 10)])
    rows = torch.zeros_like(model.lm_head.weight)
    rows[digits] = model.lm_head.weight[digits]
    model.lm_head.weight.copy_(rows)
    model.save_pretrained(folder)
    return folder


def local(folder, model, **fields):
    file = folder / "local.yaml"
    data = {"path": str(model), "prompt": "How good is '{prompt}'?", "low": 1, "high": 9, "tokens": 1}
    file.write_text(json.dumps(data | fields))
    return file


def test_a_model_of_transformers_gives_points_here(tmp_path, qwen):
    """A digit is the likeliest token after the question, as the model's own forward says of one image."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    images, prompts = pictures(6), ["a red cat", "b", "a far longer prompt than the others", "c", "b", "d"]
    found = rewards.load(f"vlm_judge:{local(tmp_path, qwen)}")(images, prompts)
    model, processor = (c.from_pretrained(qwen) for c in (AutoModelForImageTextToText, AutoProcessor))
    for image, prompt, score in zip(images, prompts, found.tolist(), strict=True):
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"<|image_pad|><|vision_end|>How good is '{prompt}'?<|im_end|>\n<|im_start|>assistant\n"
        )
        inputs = processor(text=[text], images=[image.convert("RGB")], return_tensors="pt")
        with torch.no_grad():
            said = processor.tokenizer.decode(model(**inputs).logits[0, -1].argmax())
        assert score == pytest.approx((int(said) - 1) / 8)
    conforms_to_samples(
        lambda size: rewards.load(f"vlm_judge:{local(tmp_path, qwen)}", batch_size=size), images, prompts
    )


def test_answers_of_a_batch_are_those_of_each_alone(tmp_path, qwen):
    """Questions of different lengths and numbers of images, padded on the left; several tokens each."""
    answerer = load_pairwise(str(local(tmp_path, qwen, tokens=5))).question.answerer
    one, two, three = (image.convert("RGB") for image in pictures(3))
    asked = [Asked((one,), "Why?", "a"), Asked((two, three), "Which of both is the better one?", "b")]
    together = answerer.answers(asked)
    assert together == [answerer.answers([question])[0] for question in asked]
    assert all(len(text) == 5 and text.isdigit() for text in together)


def test_models_that_cannot_be_asked(tmp_path, qwen):
    import shutil

    with pytest.raises(
        UserError, match="reward 'local': cannot load the vision-language model of '/nowhere'"
    ):
        rewards.load(f"vlm_judge:{local(tmp_path, '/nowhere')}")
    bare = tmp_path / "bare"
    shutil.copytree(qwen, bare)
    for template in ("chat_template.jinja", "chat_template.json"):
        (bare / template).unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no chat template"):
        rewards.load(f"vlm_judge:{local(tmp_path, bare)}")
