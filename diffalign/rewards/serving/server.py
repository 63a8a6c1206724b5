"""The server of rewards over HTTP and JSON, for ``remote.RemoteReward`` or any other client.

    GET /          {"rewards": [{"name", "title", "range", "licence", "notes", "timed", "edits",
                   "path"}, ...]}
    GET /health    {"status": "ok"}
    POST /NAME     {"images": [base64 of a PNG, ...], "prompts": [text, ...], "t": [time in [0, 1], ...],
                    "sources": [base64 of a PNG, ...]}
                   {"scores": [number, ...]}, one for each image, in their order; "t" and "sources" (what the
                   images are edits of) may be left out

An error is {"error": text} with status 400 for a malformed request, 404 for an unknown name, 411 for a
missing and 413 for an excessive length, 422 if the reward refuses a prompt, and 500 if the reward fails or
gives a score that is not finite. Requests are accepted concurrently; each reward processes one at a time.
There is no authentication, so the server listens on this machine alone by default.
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
from diffalign.media.sourced import SourcedPrompt
from diffalign.rewards.registry import RewardCard
from diffalign.rewards.zoo.step_aware import TimedReward
from diffalign.types import Reward

MAX_BYTES = 256 * 2**20
"""Largest request, in bytes."""
MAX_IMAGES = 1024
"""Largest number of images of a request."""
MAX_PIXELS = 64 * 10**6
"""Largest image, in pixels: a small file may decode to a huge image."""


@dataclass(frozen=True)
class Served:
    """A reward on the server.

    Attributes:
        card: its card.
        reward: the reward.
        lock: held during a call, so that its network runs one call at a time.
    """

    card: RewardCard
    reward: Reward
    lock: Lock = field(default_factory=Lock)

    def scores(self, images: list[Image.Image], prompts: list[str], t: Tensor | None) -> list[float]:
        """Return one score an image; only a ``TimedReward`` uses the times ``t``."""
        with self.lock, torch.inference_mode():
            if t is not None and isinstance(self.reward, TimedReward):
                scores = self.reward.at(images, prompts, t)
            else:
                scores = self.reward(images, prompts)
        return [float(score) for score in scores]


class RewardServer(ThreadingHTTPServer):
    """An HTTP server of rewards; ``serve_forever`` runs it until ``shutdown``."""

    daemon_threads = True  # a request in progress does not keep the process alive
    request_queue_size = 64

    def __init__(self, rewards: Mapping[str, Served], host: str = "127.0.0.1", port: int = 8765):
        """Bind the server to ``host`` and ``port``; ``rewards`` are by name, port 0 picks a free one.

        Raises:
            UserError: the address cannot be bound.
        """
        self.rewards = dict(rewards)
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen at {host}:{port} ({error}); choose another --host or --port (0: a free one)"
            ) from error

    def server_bind(self) -> None:
        """Bind as TCPServer does: HTTPServer's version also resolves the machine's host name."""
        TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that closes its connection early."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        """The server's address, such as ``http://127.0.0.1:8765``."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class _Refused(Exception):
    """A request that gets an error response with the HTTP status ``status``."""

    def __init__(self, status: int, problem: str):
        super().__init__(problem)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    timeout = 120  # seconds of silence within a request
    server_version = "diffalign"
    server: RewardServer

    def do_GET(self) -> None:
        """Respond with the list of rewards, or the server's health."""
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/":
            self._send(200, {"rewards": [_described(name, s) for name, s in self.server.rewards.items()]})
        else:
            self._send(404, {"error": f"GET {self.path}; allowed: GET /, GET /health, POST /NAME"})

    def do_POST(self) -> None:
        """Respond with the scores."""
        try:
            payload = self._payload()  # read first: a client that is still sending cannot receive an error
            name = self.path.strip("/")
            if name not in self.server.rewards:
                raise _Refused(404, str(unknown("reward", name, self.server.rewards)))
            self._send(200, {"scores": _scores(self.server.rewards[name], name, payload)})
        except _Refused as refused:
            self._send(refused.status, {"error": str(refused)})

    def _payload(self) -> Any:
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal():
            raise _Refused(411, f"Content-Length is {text!r}; allowed: the bytes of the request")
        if int(text) > MAX_BYTES:
            raise _Refused(413, f"a request of {text} bytes; allowed: at most {MAX_BYTES}")
        try:
            return json.loads(self.rfile.read(int(text)))
        except (ValueError, RecursionError) as error:
            raise _Refused(400, f"the request is not JSON: {error}") from error

    def _send(self, status: int, response: Mapping[str, Any]) -> None:
        body = json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Do not log requests."""


def _scores(served: Served, name: str, payload: Any) -> list[float]:
    """Return the scores of a request; _Refused if it is malformed or the reward fails."""
    if not isinstance(payload, dict):
        raise _Refused(400, 'the request is no object; allowed: {"images": [...], "prompts": [...]}')
    images, prompts = payload.get("images"), payload.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise _Refused(400, "prompts is no list of texts")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise _Refused(400, "images is no list of base64 texts")
    if len(images) != len(prompts) or len(images) > MAX_IMAGES:
        raise _Refused(
            400,
            f"{len(images)} images and {len(prompts)} prompts; allowed: as many, at most {MAX_IMAGES}",
        )
    t = _times(payload.get("t"), len(images))
    decoded = [_image(f"image {i}", text) for i, text in enumerate(images)]
    prompts = _sourced(prompts, payload.get("sources"))
    try:
        scores = served.scores(decoded, prompts, t)
    except UserError as error:  # the request itself is at fault: a retry would not help
        raise _Refused(422, str(error)) from error
    except Exception as error:  # any failure of a reward: the server keeps running
        raise _Refused(500, f"reward {name!r} failed: {type(error).__name__}: {error}") from error
    if len(scores) != len(images):
        raise _Refused(500, f"reward {name!r} gave {len(scores)} scores for {len(images)} images")
    for score, prompt in zip(scores, prompts, strict=True):
        if not math.isfinite(score):
            raise _Refused(500, f"reward {name!r} gave the score {score} for the prompt {prompt!r}")
    return scores


def _sourced(prompts: list[str], sources: Any) -> list[str]:
    """Return the prompts with the source images of a request, if it has any."""
    if sources is None:
        return prompts
    texts = isinstance(sources, list) and all(isinstance(source, str) for source in sources)
    if not texts or len(sources) != len(prompts):
        raise _Refused(400, f"sources is not {len(prompts)} base64 texts, one for each image")
    for i, source in enumerate(sources):
        _image(f"source {i}", source)  # refuses what is none
    return [SourcedPrompt(p, base64.b64decode(s)) for p, s in zip(prompts, sources, strict=True)]


def _times(value: Any, count: int) -> Tensor | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(t) in (int, float) and 0 <= t <= 1 for t in value)
    if not numbers or len(value) != count:
        raise _Refused(400, f"t is not {count} numbers in [0, 1], one for each image")
    return torch.tensor(value, dtype=torch.float64).float()


def _image(what: str, text: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise _Refused(400, f"{what} is {image.width} x {image.height}; allowed: {MAX_PIXELS} pixels")
            return image.convert("RGB")
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Refused(400, f"{what} is no base64 of a PNG: {error}") from error


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
        "edits": card.edits,
        "path": f"/{name}",
    }
