"""A model behind an OpenAI-compatible chat endpoint, and a file that keeps its answers.

POST <url>/chat/completions    {"model": ..., "messages": [{"role": "user", "content": ...}]}
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from diffalign.errors import UserError
from diffalign.utils.http import Asker, Patience

T = TypeVar("T")
Content = str | Sequence[dict[str, Any]]
"""Of a message: text, or parts of text and images."""


@dataclass(frozen=True)
class Tokens:
    """What answers have cost, in tokens."""

    read: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        """Both together."""
        return Tokens(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Endpoint:
    """A model and its endpoint.

    Attributes:
        url: without /chat/completions.
        model: its name there.
        key: name of the environment variable that holds the key, if the endpoint wants one.
        patience: with it.
        temperature: at which it answers; None: its own.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    patience: Patience = Patience()
    temperature: float | None = None

    def complete(self, content: Content, read: Callable[[str], T]) -> tuple[T, Tokens]:
        """Return what ``read`` makes of the answer to one message, and its tokens.

        ``read`` raises ``utils.http.UnusableError`` for an answer that is worth another try.

        Raises:
            http.NoAnswerError: no try gave one.
        """
        key = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        question: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
        }
        if self.temperature is not None:
            question["temperature"] = self.temperature
        ask = Asker(address, "chat completion", self.patience, headers)
        return ask(question, lambda answer: (read(_text(answer)), _tokens(answer)))


def check_endpoint(url: str, model: str, where: str, needed_for: str) -> None:
    """UserError for an address that is none, or no model's name; ``where`` is before the settings' names."""
    if not model:
        raise UserError(f"{where}model is empty; needed for {needed_for}: the model's name")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{where}url is {url!r}; allowed: an http:// or https:// address")


def _text(answer: Any) -> str:
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text")
    return text


def _tokens(answer: Any) -> Tokens:
    """As the endpoint counts them; some do not."""
    usage = answer.get("usage") or {}
    return Tokens(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


class Answers:
    """A file of json lines that grows by a line an answer, so that no request is made twice; thread-safe.

    Attributes:
        rows: what it held when it was opened. Lines that an interruption has cut are left out, and asked
            again.
    """

    def __init__(self, path: Path | str):
        self._file = Path(path).expanduser()
        self._lock = Lock()
        text = self._file.read_text(encoding="utf-8") if self._file.is_file() else ""
        self._cut = bool(text) and not text.endswith("\n")
        self.rows = [row for row in map(_parsed, text.split("\n")) if isinstance(row, dict)]

    def add(self, row: dict[str, Any]) -> None:
        """Write one line at once."""
        with self._lock:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n" * self._cut + json.dumps(row) + "\n")
                self._cut = False


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
