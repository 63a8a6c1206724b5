"""JSON over HTTP with retries, by urllib alone.

What may pass (a busy or restarting server, a lost connection, an answer that cannot be used) is tried again,
waiting twice as long each time or as long as the server says; what will not (a wrong key) is not.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from time import sleep
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

T = TypeVar("T")

_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses worth another try
_HERE = ("localhost", "127.0.0.1", "::1")  # never reached through a proxy


@dataclass(frozen=True)
class Patience:
    """How long to wait and how often to try.

    Attributes:
        timeout: seconds that an answer may take.
        retries: further tries after a failure that may pass.
        pause: seconds before the second try; each further wait is twice as long.
        longest: seconds between two tries, at most.
    """

    timeout: float = 60.0
    retries: int = 5
    pause: float = 1.0
    longest: float = 60.0

    def wait(self, attempt: int, asked_for: float) -> float:
        """Seconds before try number ``attempt`` (1: the second), at least those that the server named."""
        return min(max(self.pause * 2 ** (attempt - 1), asked_for), self.longest)


class UnusableError(ValueError):
    """An answer that is no use, and why: worth another try."""


class NoAnswerError(Exception):
    """No try gave an answer.

    Attributes:
        problem: what was wrong with the last one.
        tries: how many there were.
    """

    def __init__(self, problem: str, tries: int):
        super().__init__(problem, tries)
        self.problem = problem
        self.tries = tries


@dataclass(frozen=True)
class Asker:
    """Where questions go.

    Attributes:
        url: the address.
        what: an answer's name, for messages: "an answer that is no <what>".
        patience: with it.
        headers: sent with every question.
    """

    url: str
    what: str
    patience: Patience = Patience()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __call__(self, question: Any, read: Callable[[Any], T]) -> T:
        """Return what ``read`` makes of the answer's JSON.

        ``read`` raises UnusableError for an answer that is no use, or what a JSON of another shape makes it
        raise (ValueError, LookupError, TypeError).

        Raises:
            NoAnswerError: no try gave one.
        """
        body, problem, asked_for = json.dumps(question).encode(), "", 0.0
        for attempt in range(self.patience.retries + 1):
            if attempt:
                sleep(self.patience.wait(attempt, asked_for))
            try:
                return read(self._answer(body))
            except HTTPError as error:
                problem = f"status {error.code}: {_reason(error)}"
                asked_for = _seconds(error.headers.get("Retry-After"))
                if error.code not in _MAY_PASS:
                    break
            except URLError as error:
                problem = str(error.reason)
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
            except (ValueError, LookupError, TypeError) as error:
                problem = (
                    str(error) if isinstance(error, UnusableError) else f"an answer that is no {self.what}"
                )
        raise NoAnswerError(problem, attempt + 1)

    def _answer(self, body: bytes) -> Any:
        here = urlsplit(self.url).hostname in _HERE
        opener = build_opener(ProxyHandler({})) if here else build_opener()
        request = Request(self.url, body, {"Content-Type": "application/json", **self.headers})
        with opener.open(request, timeout=self.patience.timeout) as response:
            return json.load(response)


def _reason(error: HTTPError) -> str:
    """Return the server's message: ``{"error": text}``, ``{"error": {"message": text}}``, or plain text."""
    text = error.read(2000).decode(errors="replace")
    try:
        detail = json.loads(text)["error"]
        return str(detail["message"] if isinstance(detail, dict) else detail)
    except (ValueError, KeyError, TypeError):
        return text.strip()[:200] or str(error.reason)


def _seconds(text: str | None) -> float:
    """Of a ``Retry-After``; dates count as nothing."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
