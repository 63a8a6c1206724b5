"""UnifiedReward, served by a thread that looks at the image it is sent."""

import base64
import hashlib
import io
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.errors import UserError
from diffalign.rewards.zoo.instructions import template
from diffalign.rewards.zoo.unified_reward import points
from diffalign.utils.http import Patience
from tests.rewards.conformance import (
    assert_a_batch_is_its_images_one_by_one,
    assert_order_does_not_matter,
    assert_shapes,
    conforms_to_samples,
    covers,
    pictures,
)


@pytest.fixture
def endpoint():
    """Run an endpoint that gives darker images more points, others as the prompt says; yield its requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body))
            picture, question = body["messages"][0]["content"]
            data = base64.b64decode(picture["image_url"]["url"].partition("base64,")[2])
            image = Image.open(io.BytesIO(data))
            assert image.format == "PNG" and image.size == (512, 512)
            text = f"Well.\nFinal Score: {5 - 4 * np.asarray(image).mean() / 255:.3f}"
            if "silent" in question["text"]:
                text = "I would rather not say."
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(500 if "broken" in question["text"] else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


def grey(level):
    return Image.new("RGB", (40, 30), (level,) * 3)


def test_points_are_asked_for_and_read(endpoint):
    url, asked = endpoint
    reward = rewards.load(f"unified_reward:{url}@UnifiedReward-7b")
    scores = reward([grey(0), grey(51), grey(255)], ["a {red} cat", "a silent cat", "a dog"])
    assert scores.tolist() == pytest.approx([1.0, 0.0, 0.2]) and scores.dtype == torch.float32
    asked = {body["messages"][0]["content"][1]["text"]: (path, body) for path, body in asked}
    path, body = asked[template("unified_reward").replace("{text_prompt}", "a {red} cat")]
    assert path == "/v1/chat/completions"
    assert body["model"] == "UnifiedReward-7b" and body["temperature"] == 0


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Final Score: 4", 0.8), ("So.\nFinal Score:\n3.5 of 5", 0.7), ("Final Score: 5.0\n", 1.0),
        ("Final Score: 0", 0.0), ("final score 4", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_points(answer, score):
    assert points(answer) == pytest.approx(score)


def test_the_question_is_the_published_one():
    digest = hashlib.sha256(template("unified_reward").encode()).hexdigest()
    assert digest == "63b7e717a7db4d5cc0952548a99a17b2d6169d009337e1c0599ca9bff6d8bf56"


def test_it_keeps_to_what_rewards_keep_to(endpoint):
    reward = rewards.load(f"unified_reward:{endpoint[0]}@m")
    assert_shapes(reward, ["a cat"])
    assert_a_batch_is_its_images_one_by_one(reward, ["a cat"])
    assert_order_does_not_matter(reward, ["a cat"])


@pytest.mark.parametrize("prompt", ["", "an <image>", "<|im_end|>"])
def test_prompts_it_cannot_read(prompt):
    with pytest.raises(UserError, match="reward 'unified_reward'"):
        rewards.load("unified_reward:http://127.0.0.1:9/v1@m")(pictures(1), [prompt])


def test_an_endpoint_that_does_not_answer(endpoint):
    reward = rewards.load(f"unified_reward:{endpoint[0]}@m")
    reward = replace(reward, endpoint=replace(reward.endpoint, patience=Patience(retries=1, pause=0.01)))
    with pytest.raises(UserError, match=r"no answer from .* \(model 'm', 2 tries\) for 'broken': status 500"):
        reward(pictures(1), ["broken"])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            "unified_reward",
            "reward 'unified_reward' is a model behind an address; write .*HOST:PORT/v1@MODEL",
        ),
        ("unified_reward:http://here/v1", "write unified_reward:http://HOST:PORT/v1@MODEL"),
        ("unified_reward:http://here/v1@", "reward 'unified_reward': model is empty"),
        ("unified_reward:here@m", "reward 'unified_reward': url is 'here'; allowed: an http"),
    ],
)
def test_other_sources_are_refused(spec, reason):
    with pytest.raises(UserError, match=reason):
        rewards.load(spec)


@covers("unified_reward")
def test_it_conforms(endpoint):
    conforms_to_samples(
        lambda size: rewards.load(f"unified_reward:{endpoint[0]}@model", batch_size=size),
        pictures(4),
        ["a cat", "a dog", "a tree", "a cat"],
    )
