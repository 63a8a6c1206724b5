"""Captions made wrong by a language model behind an OpenAI-compatible chat endpoint; nothing but urllib.

Answers are kept in a file of json lines as they come, so that a run that is started again asks nothing twice;
several threads may ask at once (``data.workers``).
"""

import json
import os
import time
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from diffalign.config import AlteredConfig
from diffalign.errors import UserError
from diffalign.randomness import derive

PRINCIPLES = {
    "content": "replace one object by a different object",
    "attribute": "change one attribute of an object: its colour, size, number, material or shape",
    "spatial": "change how two objects lie to each other, or where in the picture one is",
    "contextual": "change the setting: the place, the time, the weather, or what somebody is doing",
}
_MAY_PASS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # statuses worth another try
_LONGEST = 60.0  # seconds between two tries


class Chat:
    """A caption that no longer describes its image, by a language model.

    Each caption gets one of four kinds of edit, drawn by its text.
    """

    def __init__(self, config: AlteredConfig, pause: float = 1.0):
        """``pause``: seconds before the second try. Raises UserError for a missing or impossible setting."""
        if not config.model:
            raise UserError("data.altered.model is empty; needed for data.altered.by llm: the model's name")
        if not config.url.startswith(("http://", "https://")):
            raise UserError(f"data.altered.url is {config.url!r}; allowed: an http:// or https:// address")
        self._config = config
        self._pause = pause
        self._lock = Lock()
        self._file = Path(config.answers).expanduser()
        self._cut = False  # whether an interruption has left half a line
        self._known = self._read()

    @property
    def fingerprint(self) -> str:
        """Whom it asks: answers that are known stay as they are."""
        return f"llm {self._config.url} {self._config.model} {self._config.answers}"

    def __call__(self, caption: str) -> str:
        """The altered caption; UserError naming the caption if no try gives one."""
        if caption in self._known:
            return self._known[caption]
        altered = self._ask(caption)
        line = json.dumps({"model": self._config.model, "caption": caption, "altered": altered})
        with self._lock:
            self._known[caption] = altered
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n" * self._cut + line + "\n")
                self._cut = False
        return altered

    def _read(self) -> dict[str, str]:
        known: dict[str, str] = {}
        text = self._file.read_text(encoding="utf-8") if self._file.is_file() else ""
        self._cut = not text.endswith("\n") and bool(text)
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                if row["model"] == self._config.model:
                    known[row["caption"]] = row["altered"]
            except (ValueError, KeyError, TypeError):  # asked again
                continue
        return known

    def _ask(self, caption: str) -> str:
        problem = ""
        for attempt in range(self._config.retries + 1):
            if attempt:
                time.sleep(min(self._pause * 2 ** (attempt - 1), _LONGEST))
            try:
                answer = self._answer(caption)
            except HTTPError as error:
                problem = f"status {error.code}: {error.read(200).decode(errors='replace').strip()}"
                if error.code not in _MAY_PASS:
                    break
            except URLError as error:
                problem = str(error.reason)
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
            except (ValueError, KeyError, IndexError, TypeError):
                problem = "an answer that is no chat completion"
            else:
                if answer and answer.casefold() != caption.strip().casefold():
                    return answer
                problem = f"the answer {answer!r}, which is no other caption"
        raise UserError(
            f"data.altered: no altered caption for {caption!r} from {self._config.url} "
            f"(model {self._config.model!r}, {attempt + 1} tries): {problem}"
        )

    def _answer(self, caption: str) -> str:
        """One try: the first line of the answer, without quotation marks."""
        principle = list(PRINCIPLES.values())[derive(0, "principle", caption) % len(PRINCIPLES)]
        order = (
            f"Rewrite this image caption so that it no longer describes the same image: {principle}. Change "
            f"nothing else, keep it grammatical and about as long. Answer with the caption only.\n\n{caption}"
        )
        body: dict[str, Any] = {"model": self._config.model, "messages": [{"role": "user", "content": order}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._config.key):
            headers["Authorization"] = f"Bearer {key}"
        address = self._config.url.rstrip("/") + "/chat/completions"
        request = Request(address, json.dumps(body).encode(), headers)
        with urlopen(request, timeout=self._config.timeout) as response:
            content = json.load(response)["choices"][0]["message"]["content"]
        return (
            next((line.strip() for line in content.splitlines() if line.strip()), "").strip("\"'“”").strip()
        )
