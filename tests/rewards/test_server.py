"""Remote rewards: equal scores, clear refusals, retries after failures. Localhost only."""

import base64
import io
import json
import os
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign import rewards
from diffalign.cli import main
from diffalign.errors import UserError
from diffalign.rewards.registry import parse
from diffalign.rewards.scoring.score import make_scorers
from diffalign.rewards.serving import server as serving
from diffalign.rewards.serving.remote import RemoteReward
from diffalign.rewards.serving.server import RewardServer, Served
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.tiny import scenes


class Timed:
    """Scores by the time it is told: 10 t, and the number of the image's red channel at time 0."""

    def __call__(self, images, prompts):
        return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images])

    def at(self, images, prompts, t):
        return 10 * t


class Fails:
    def __call__(self, images, prompts):
        raise RuntimeError("no luck")


class Gives:
    def __init__(self, scores):
        self.scores = scores

    def __call__(self, images, prompts):
        return torch.tensor(self.scores)


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def address():
    card = parse("judge")[0]
    served = {name: Served(parse(name)[0], rewards.load(name)) for name in ("judge", "tiny_clip")}
    served |= {"timed": Served(card, Timed()), "fails": Served(card, Fails())}
    served |= {"nan": Served(card, Gives([float("nan")])), "two": Served(card, Gives([1.0, 2.0]))}
    with running(RewardServer(served, port=0)) as where:
        yield where


@contextmanager
def answering(*answers):
    """Run a server of scripted (status, body) answers, the last repeated; yield its address and requests."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answers[min(len(asked), len(answers)) - 1]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with running(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as where:
        yield f"{where}/fake", asked


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    captions = list(scenes.split_captions("test")[:6])
    return [scenes.render(scenes.scene_of(c, random)) for c in captions], captions


def png(size=(2, 2), colour=(7, 0, 0), form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format=form)
    return base64.b64encode(buffer.getvalue()).decode()


def post(url, question):
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            urllib.request.Request(url, body), timeout=30
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def get(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=30) as response:
        return json.load(response)


@pytest.mark.parametrize("name", ["judge", "tiny_clip"])
@pytest.mark.parametrize("batch_size", [4, 16])
def test_remote_scores_are_the_local_ones(address, drawn, name, batch_size):
    images, captions = drawn
    prompts = captions[1:] + captions[:1] if name == "judge" else captions
    local = rewards.load(name, batch_size=batch_size)(images, prompts)
    remote = rewards.load(f"{address}/{name}", batch_size=batch_size)(images, prompts)
    assert remote.dtype == torch.float32 and local.unique().numel() > 1
    torch.testing.assert_close(remote, local, rtol=0, atol=0 if name == "judge" else 1e-5)


def test_pixels_are_rounded_to_the_saved_image(address):
    pixels = torch.full((2, 3, 2, 2), 100.4 / 255)
    pixels[1] = 100.6 / 255
    assert RemoteReward(f"{address}/timed")(pixels, ["a", "b"]).tolist() == [100.0, 101.0]


def test_time_travels_and_rewards_without_time_ignore_it(address, drawn):
    images, captions = drawn
    timed = RemoteReward(f"{address}/timed", batch_size=4)
    assert isinstance(timed, TimedReward)
    t = torch.linspace(0, 1, 6)
    assert torch.equal(timed.at(images, captions, t), 10 * t)
    judge = RemoteReward(f"{address}/judge", batch_size=4)
    assert torch.equal(judge.at(images, captions, t), judge(images, captions))
    assert judge([], []).shape == judge.at([], [], torch.zeros(0)).shape == (0,)


def test_a_server_lists_its_rewards(address):
    listed = {row["name"]: row for row in get(address)["rewards"]}
    assert set(listed) == {"judge", "tiny_clip", "timed", "fails", "nan", "two"}
    assert listed["judge"]["title"] == parse("judge")[0].title and listed["judge"]["path"] == "/judge"
    assert listed["timed"]["timed"] and not listed["judge"]["timed"]
    assert get(f"{address}/health") == {"status": "ok"}


@pytest.mark.parametrize(
    ("name", "question", "status", "words"),
    [
        ("jugde", {"images": [], "prompts": []}, 404, "did you mean judge"),
        ("judge", b"{", 400, "not JSON"),
        ("judge", b"[" * 100_000, 400, "not JSON"),
        ("judge", [], 400, "no object"),
        ("judge", {"images": [png()]}, 400, "prompts is no list"),
        ("judge", {"images": [png()], "prompts": [1]}, 400, "prompts is no list"),
        ("judge", {"images": png(), "prompts": ["a"]}, 400, "images is no list"),
        ("judge", {"images": [png()], "prompts": ["a", "b"]}, 400, "1 images and 2 prompts"),
        ("judge", {"images": ["%%"], "prompts": ["a"]}, 400, "image 0 is no base64 of a PNG"),
        ("judge", {"images": [png(form="JPEG")], "prompts": ["a"]}, 400, "no base64 of a PNG"),
        ("judge", {"images": [png()[:40]], "prompts": ["a"]}, 400, "no base64 of a PNG"),
        ("timed", {"images": [png()], "prompts": ["a"], "t": [2]}, 400, "[0, 1]"),
        ("timed", {"images": [png()], "prompts": ["a"], "t": [0, 1]}, 400, "1 numbers"),
        ("timed", {"images": [png()], "prompts": ["a"], "t": [True]}, 400, "[0, 1]"),
        ("judge", {"images": [png()], "prompts": ["no such scene"]}, 422, "'no such scene'"),
        ("fails", {"images": [png()], "prompts": ["a"]}, 500, "RuntimeError: no luck"),
        ("nan", {"images": [png()], "prompts": ["a"]}, 500, "nan for the prompt 'a'"),
        ("two", {"images": [png()], "prompts": ["a"]}, 500, "2 scores for 1 images"),
        ("timed", {"images": [png()], "prompts": ["a"]}, 200, "7.0"),
    ],
)
def test_what_is_wrong_is_said(address, name, question, status, words):
    found, answer = post(f"{address}/{name}", question)
    assert (found, words in str(answer)) == (status, True), answer


def test_questions_have_a_size(address, monkeypatch):
    monkeypatch.setattr(serving, "MAX_BYTES", 10)
    assert post(f"{address}/judge", {"images": [], "prompts": []})[0] == 413
    monkeypatch.undo()
    monkeypatch.setattr(serving, "MAX_PIXELS", 3)
    status, answer = post(f"{address}/judge", {"images": [png()], "prompts": ["a"]})
    assert status == 400 and "2 x 2" in answer["error"]
    monkeypatch.setattr(serving, "MAX_IMAGES", 1)
    assert post(f"{address}/judge", {"images": [png()] * 2, "prompts": ["a"] * 2})[0] == 400


def test_a_reward_answers_one_question_at_a_time():
    busy = threading.Lock()

    class Jealous:
        def __call__(self, images, prompts):
            assert busy.acquire(blocking=False)
            threading.Event().wait(0.02)
            busy.release()
            return torch.ones(len(images))

    with running(RewardServer({"one": Served(parse("judge")[0], Jealous())}, port=0)) as where:
        found = []
        ask = lambda: found.append(post(f"{where}/one", {"images": [png()], "prompts": ["a"]}))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [(200, {"scores": [1.0]})] * 6


IMAGE = [Image.new("RGB", (2, 2))]
GOOD = (200, b'{"scores": [0.25]}')


def test_a_failure_that_passes_is_waited_for():
    with answering((503, b"busy"), (200, b"not json"), GOOD) as (url, asked):
        assert RemoteReward(url, pause=0.001)(IMAGE, ["a cat"]).tolist() == [0.25]
    assert len(asked) == 3 and asked[0] == asked[2] and asked[0]["prompts"] == ["a cat"]
    assert set(asked[0]) == {"images", "prompts"}


def test_waits_double(monkeypatch):
    waits = []
    monkeypatch.setattr("diffalign.utils.http.sleep", waits.append)
    with answering((500, b'{"error": "no luck"}')) as (url, asked), pytest.raises(UserError) as error:
        RemoteReward(url)(IMAGE, ["a cat"])
    assert waits == [0.5, 1.0, 2.0] and len(asked) == 4
    assert url in str(error.value) and "'a cat' (4 tries): status 500: no luck" in str(error.value)


@pytest.mark.parametrize(
    ("answer", "tries", "words"),
    [
        ((422, b'{"error": "cannot read it"}'), 1, "status 422: cannot read it"),
        ((404, b"nothing here"), 1, "status 404: nothing here"),
        ((200, b"<html>"), 4, "no scores"),
        ((200, b"[0.5]"), 4, "no scores"),
        ((200, b'{"score": [0.5]}'), 4, "no scores"),
        ((200, b'{"scores": ["good"]}'), 4, "no list of numbers"),
        ((200, b'{"scores": [true]}'), 4, "no list of numbers"),
        ((200, b'{"scores": 0.5}'), 4, "no list of numbers"),
        ((200, b'{"scores": [0.5, 0.5]}'), 4, "2 scores for 1 images"),
        ((200, b'{"scores": [NaN]}'), 4, "nan for 'a cat'"),
        ((200, b'{"scores": [1e300]}'), 4, "1e+300 for 'a cat'"),
        ((200, b"\x80\x04N."), 4, "no scores"),  # a pickle is an answer like any other that is not JSON
    ],
)
def test_an_answer_that_is_none_stops_with_url_and_prompt(answer, tries, words):
    with answering(answer) as (url, asked), pytest.raises(UserError) as error:
        RemoteReward(url, pause=0.001)(IMAGE, ["a cat"])
    assert len(asked) == tries
    assert all(word in str(error.value) for word in (url, "'a cat'", words))


def test_nobody_there():
    with running(RewardServer({}, port=0)) as where:
        pass
    with pytest.raises(UserError, match=r"(?i)refused") as error:
        RemoteReward(f"{where}/judge", pause=0.001)([*IMAGE] * 5, list("abcde"))
    assert "'a', 'b', 'c' and 2 more (4 tries)" in str(error.value)


def test_an_answer_that_never_comes():
    free = threading.Event()

    class Slow:
        def __call__(self, images, prompts):
            free.wait(5)
            return torch.zeros(len(images))

    with running(RewardServer({"slow": Served(parse("judge")[0], Slow())}, port=0)) as where:
        remote = RemoteReward(f"{where}/slow", timeout=0.1, retries=1, pause=0.001)
        try:
            with pytest.raises(UserError, match="timed out"):
                remote(IMAGE, ["a"])
        finally:
            free.set()


def test_addresses_are_specs():
    card, source = parse("https://host.example/x/my_model/")
    assert (card.name, source, card.cached) == ("my_model", "https://host.example/x/my_model/", False)
    for bad in ("http://", "http://host", "http://host:port/judge", "https:///judge", "http://h:99999/judge"):
        with pytest.raises(UserError, match="no address of a reward"):
            parse(bad)
    (scorer,) = make_scorers(["http://127.0.0.1:9/judge"])
    assert scorer.name == "judge" and scorer.key is None


def test_score_takes_an_address(address, drawn, tmp_path, capsys):
    image, caption = drawn[0][0], drawn[1][0]
    image.save(tmp_path / "one.png")
    (tmp_path / "one.txt").write_text(caption)
    assert main(["score", str(tmp_path), "--rewards", f"{address}/judge", "--device", "cpu"]) == 0
    row = json.loads((tmp_path / "scores.jsonl").read_text())
    assert row["judge"] == float(rewards.load("judge")([image], [caption]))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rewards", "jugde"], "did you mean judge"),
        (["--rewards", "pickscore:/a,pickscore:/b"], "'pickscore' twice"),
        (["--rewards", "judge", "--port", "70000"], "70000"),
        (["--rewards", "judge", "--device", "tpu"], "tpu"),
        (
            ["--rewards", "judge", "--parent", "999999999"],
            f"allowed: {os.getppid()}, which",
        ),
    ],
)
def test_the_command_refuses(flags, words, capsys):
    assert main(["serve-rewards", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_taken_port_is_told_before_weights_are_loaded(monkeypatch, capsys):
    monkeypatch.setattr("diffalign.rewards.registry.load", None)
    with running(RewardServer({}, port=0)) as where:
        port = where.rpartition(":")[2]
        assert main(["serve-rewards", "--rewards", "judge", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_taken_port_is_a_user_error():
    with (
        running(RewardServer({}, port=0)) as where,
        pytest.raises(UserError, match=r"cannot listen at 127.0.0.1"),
    ):
        RewardServer({}, port=int(where.rpartition(":")[2]))
