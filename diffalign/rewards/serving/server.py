"""Rewards over HTTP and JSON, for ``remote.RemoteReward`` or any other client, by the standard library.

    GET /          {"rewards": [{"name", "title", "range", "licence", "notes", "timed", "path"}, ...]}
    GET /health    {"status": "ok"}
    POST /NAME     {"images": [base64 of a PNG, ...], "prompts": [text, ...], "t": [time in [0, 1], ...]}
                   {"scores": [number, ...]}, one for each image, in their order; "t" may be left out

An error is {"error": text}: 400 for a malformed request, 404 for an unknown name,
411 and 413 for its length, 422 where the reward refuses a prompt; 500 where the reward fails,
or gives a score that is no finite number. Several questions may come at once; each reward answers one at a
time. There is no password: whoever reaches the port may ask, so the default is this machine alone.
"""

import base64
import binascii
import io
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError, unknown
from diffalign.rewards.registry import RewardCard
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.types import Reward

MAX_BYTES = 256 * 2**20
"""Of a question."""
MAX_IMAGES = 1024
"""In a question."""
MAX_PIXELS = 64 * 10**6
"""Of an image: a small file may hold a huge one."""


@dataclass(frozen=True)
class Served:
    """A reward, its card, and the lock that keeps its network from two calls at once."""

    card: RewardCard
    reward: Reward
    lock: Lock = field(default_factory=Lock)

    def scores(self, images: list[Image.Image], prompts: list[str], t: Tensor | None) -> list[float]:
        """One score an image; ``t`` is for rewards that know time."""
        with self.lock, torch.inference_mode():
            if t is not None and isinstance(self.reward, TimedReward):
                found = self.reward.at(images, prompts, t)
            else:
                found = self.reward(images, prompts)
        return [float(score) for score in found]


class RewardServer(ThreadingHTTPServer):
    """Serves rewards until ``shutdown``; ``address`` says where."""

    daemon_threads = True  # whoever is still asking does not keep the process alive
    request_queue_size = 64

    def __init__(self, rewards: Mapping[str, Served], host: str = "127.0.0.1", port: int = 8765):
        """``rewards`` by name; port 0 picks a free one. UserError if the port cannot be had."""
        self.rewards = dict(rewards)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen at {host}:{port} ({error}); choose another --host or --port (0: a free one)"
            ) from error

    def server_bind(self) -> None:
        """As TCPServer has it: HTTPServer also asks the network for this machine's name."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that leaves early."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """``http://127.0.0.1:8765``."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Refused(Exception):
    """A question that is answered by an error."""

    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    timeout = 120  # seconds between two pieces of a question
    server_version = "diffalign"
    server: RewardServer

    def do_GET(self) -> None:
        """Answer with the list of rewards, or whether the server is up."""
        if self.path == "/health":
            self._say(200, {"status": "ok"})
        elif self.path == "/":
            self._say(200, {"rewards": [_described(name, s) for name, s in self.server.rewards.items()]})
        else:
            self._say(404, {"error": f"GET {self.path}; allowed: GET /, GET /health, POST /NAME"})

    def do_POST(self) -> None:
        """Answer with the scores."""
        try:
            question = self._question()  # read before anything is refused, or the client cannot hear why
            name = self.path.strip("/")
            if name not in self.server.rewards:
                raise _Refused(404, str(unknown("reward", name, self.server.rewards)))
            self._say(200, {"scores": _answered(self.server.rewards[name], name, question)})
        except _Refused as refused:
            self._say(refused.status, {"error": str(refused)})

    def _question(self) -> Any:
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal():
            raise _Refused(411, f"Content-Length is {text!r}; allowed: the bytes of the question")
        if int(text) > MAX_BYTES:
            raise _Refused(413, f"a question of {text} bytes; allowed: at most {MAX_BYTES}")
        try:
            return json.loads(self.rfile.read(int(text)))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the question is not JSON: {error}") from error

    def _say(self, status: int, answer: Mapping[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """No line a question."""


def _answered(served: Served, name: str, question: Any) -> list[float]:
    """Return the scores that answer a question; _Refused if there are none."""
    if not isinstance(question, dict):
        raise _Refused(400, 'the question is no object; allowed: {"images": [...], "prompts": [...]}')
    images, prompts = question.get("images"), question.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _Refused(400, "prompts is no list of texts")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _Refused(400, "images is no list of base64 texts")
    if len(images) != len(prompts) or len(images) > MAX_IMAGES:
        raise _Refused(
            400,
            f"{len(images)} images and {len(prompts)} prompts; allowed: as many, at most {MAX_IMAGES}",
        )
    t = _times(question.get("t"), len(images))
    decoded = [_image(i, text) for i, text in enumerate(images)]
    try:
        scores = served.scores(decoded, prompts, t)
    except UserError as error:  # another try would not help
        raise _Refused(422, str(error)) from error
    except Exception as error:  # whatever it was, the server goes on
        raise _Refused(500, f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(images):
        raise _Refused(500, f"reward {name!r} gave {len(scores)} scores for {len(images)} images")
    for score, prompt in zip(scores, prompts, strict=True):
        if not math.isfinite(score):
            raise _Refused(500, f"reward {name!r} gave the score {score} for the prompt {prompt!r}")
    return scores


def _times(given: Any, count: int) -> Tensor | None:
    if given is None:
        return None
    numbers = isinstance(given, list) and all(type(t) in (int, float) and 0 <= t <= 1 for t in given)
    if not numbers or len(given) != count:
        raise _Refused(400, f"t is not {count} numbers in [0, 1], one for each image")
    return torch.tensor(given, dtype=torch.float64).float()


def _image(index: int, text: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _Refused(
                    400, f"image {index} is {image.width} x {image.height}; allowed: {MAX_PIXELS} pixels"
                )
            return image.convert("RGB")
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Refused(400, f"image {index} is no base64 of a PNG: {error}") from error


def _described(name: str, served: Served) -> dict[str, Any]:
    card = served.card
    timed = isinstance(served.reward, TimedReward)
    return {
        "name": name,
        "title": card.title,
        "range": card.range,
        "licence": card.licence,
        "notes": card.notes,
        "timed": timed,
        "path": f"/{name}",
    }
