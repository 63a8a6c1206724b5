"""A client of OpenAI-compatible chat endpoints, and a file that stores the answers.

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
from diffalign.utils.http import JsonClient, Patience

T = TypeVar("T")
Content = str | Sequence[dict[str, Any]]
"""Content of a message: text, or a list of text and image parts."""


@dataclass(frozen=True)
class Tokens:
    """Token counts of answers.

    Attributes:
        read: prompt tokens.
        written: completion tokens.
    """

    read: int = 0
    written: int = 0

    def __add__(self, other: "Tokens") -> "Tokens":
        """Return the sums of both counts."""
        return Tokens(self.read + other.read, self.written + other.written)


@dataclass(frozen=True)
class Endpoint:
    """A model at an OpenAI-compatible endpoint.

    Attributes:
        url: address without /chat/completions.
        model: the model's name at the endpoint.
        key: name of the environment variable that holds the API key; it is sent if the variable is set.
        patience: timeout and retries.
        temperature: sampling temperature; None leaves the endpoint's default.
    """

    url: str
    model: str
    key: str = "OPENAI_API_KEY"
    patience: Patience = Patience()
    temperature: float | None = None

    def complete(self, content: Content, read: Callable[[str], T]) -> tuple[T, Tokens]:
        """Send one user message; return ``read`` of the answer's text, and the token counts.

        ``read`` raises ``utils.http.UnusableError`` for an answer that cannot be used; the request is then
        retried.

        Raises:
            http.NoAnswerError: no try gave a usable answer.
        """
        key = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        address = self.url.rstrip("/") + "/chat/completions"
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
        }
        if self.temperature is not None:
            payload["temperature"] = self.temperature
        client = JsonClient(address, "chat completion", self.patience, headers)
        return client.post(payload, lambda response: (read(_text(response)), _tokens(response)))


def check_endpoint(url: str, model: str, where: str, needed_for: str) -> None:
    """Check the address and the model name of an endpoint; ``where`` precedes the setting in messages.

    Raises:
        UserError: the model's name is empty, or the address is not http or https.
    """
    if not model:
        raise UserError(f"{where}model is empty; needed for {needed_for}: the model's name")
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{where}url is {url!r}; allowed: an http:// or https:// address")


def _text(response: Any) -> str:
    text = response["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("no text")
    return text


def _tokens(response: Any) -> Tokens:
    """Return the endpoint's token counts; 0 where it reports none."""
    usage = response.get("usage") or {}
    return Tokens(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


class Answers:
    """A jsonl file of answers, one line each, so that no request is repeated after a restart; thread-safe.

    Attributes:
        rows: the answers that the file held when it was opened, without lines cut off by an interruption.
    """

    def __init__(self, path: Path | str):
        self._file = Path(path).expanduser()
        self._lock = Lock()
        text = self._file.read_text(encoding="utf-8") if self._file.is_file() else ""
        self._cut = bool(text) and not text.endswith("\n")
        self.rows = [row for row in map(_parsed, text.split("\n")) if isinstance(row, dict)]

    def add(self, row: dict[str, Any]) -> None:
        """Append one line and flush it."""
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
