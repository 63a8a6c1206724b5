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
from diffalign.rewards.zoo.vlm_judge import load_pairwise, points, winner
from diffalign.utils.http import UnusableError
from tests.rewards.conformance import conforms_to_samples, covers, pictures


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
    ],
)
def test_bad_files(tmp_path, address, fields, words):
    with pytest.raises(UserError, match=words):
        rewards.load(f"vlm_judge:{written(tmp_path, address, **fields)}")
