"""A client for JSON over HTTP with retries, on urllib alone.

Transient failures (a busy or restarting server, a lost connection, an unusable response) are retried with
exponential backoff, or after the server's Retry-After. Permanent ones (a wrong key) are not.
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

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses that are retried
_LOCAL = ("localhost", "127.0.0.1", "::1")  # hosts that are never reached through a proxy


@dataclass(frozen=True)
class Patience:
    """Timeout and retries of a request.

    Attributes:
        timeout: seconds to wait for a response.
        retries: further tries after a transient failure.
        pause: seconds before the second try; each further wait is twice as long.
        longest: longest wait between two tries, in seconds.
    """

    timeout: float = 60.0
    retries: int = 5
    pause: float = 1.0
    longest: float = 60.0

    def wait(self, attempt: int, retry_after: float) -> float:
        """Return the seconds to wait before retry number ``attempt``, counted from 1.

        It is at least ``retry_after``, the server's wish, and at most ``longest``.
        """
        return min(max(self.pause * 2 ** (attempt - 1), retry_after), self.longest)


class UnusableError(ValueError):
    """A response that cannot be used, and the reason; the request is retried."""


class NoAnswerError(Exception):
    """No try gave a usable response.

    Attributes:
        problem: the reason of the last failure.
        tries: number of tries.
    """

    def __init__(self, problem: str, tries: int):
        super().__init__(problem, tries)
        self.problem = problem
        self.tries = tries


@dataclass(frozen=True)
class JsonClient:
    """A client that posts JSON to one address.

    Attributes:
        url: the address.
        what: noun for a response, for messages: "an answer that is no <what>".
        patience: timeout and retries.
        headers: headers of every request.
    """

    url: str
    what: str
    patience: Patience = Patience()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def post(self, payload: Any, read: Callable[[Any], T]) -> T:
        """Post ``payload`` as JSON and return ``read`` of the response's JSON.

        ``read`` raises UnusableError for a response that cannot be used. A ValueError, LookupError or
        TypeError, as JSON of another structure causes, has the same effect: the request is retried.

        Raises:
            NoAnswerError: no try gave a usable response.
        """
        body, problem, retry_after = json.dumps(payload).encode(), "", 0.0
        for attempt in range(self.patience.retries + 1):
            if attempt:
                sleep(self.patience.wait(attempt, retry_after))
            try:
                return read(self._send(body))
            except HTTPError as error:
                problem = f"status {error.code}: {_reason(error)}"
                retry_after = _seconds(error.headers.get("Retry-After"))
                if error.code not in _TRANSIENT:
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

    def _send(self, body: bytes) -> Any:
        local = urlsplit(self.url).hostname in _LOCAL
        opener = build_opener(ProxyHandler({})) if local else build_opener()
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
    """Return the seconds of a ``Retry-After`` header; 0 if it is missing or a date."""
    try:
        return max(0.0, float(text or 0))
    except ValueError:
        return 0.0
