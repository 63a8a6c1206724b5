"""A vision-language model behind an OpenAI-compatible endpoint as a judge of segments, in both orders.

DenseDPO's recipe: the frames of a segment of both videos, 8 a second, and the question which of them has
fewer artefacts. Models favour a place, so each segment is judged in both orders; answers that contradict each
other, or that cannot be read, are a tie. Every answer is kept as it comes, with its tokens, so that nothing
is asked twice: not after an interruption, and not when one of the videos comes in another pair's file.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from PIL import Image

from diffalign.data.reading.examples import digest
from diffalign.errors import UserError
from diffalign.media.frames import frame_image
from diffalign.media.videos import Video
from diffalign.preferences.segments.pairs import Label, Pair, cut
from diffalign.utils.chat_completions import Answers, Endpoint, Tokens
from diffalign.utils.http import NoAnswerError

QUESTION = """\
The images above are frames, in order, of the same stretch of two generated videos: first those of video 1,
then those of video 2. Both were meant to show: {prompt}

They have the same layout and motion on purpose, so judge neither. Look for defects only: bodies, hands, faces
or objects that are distorted, that merge, appear or vanish; flicker; texture that breaks up; motion that
nature does not know. Which video has fewer and smaller defects in these frames? Be conservative: unless one
is clearly better, call it a tie.

Say briefly what you see. Then end with one line that is a single word: FIRST, SECOND or TIE."""

_WORDS = re.compile(r"\b(first|second|tie)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Asking:
    """Settings of the questions to the model.

    Attributes:
        seconds: of a segment.
        fps: frames a second that it is shown; fewer where a video has fewer.
        side: pixels of a frame's longer side, at most.
        question: the text after the frames; ``{prompt}`` in it becomes the videos' prompt.
        price_in: of a million tokens read.
        price_out: of a million tokens written.
    """

    seconds: float = 1.0
    fps: float = 8.0
    side: int = 512
    question: str = QUESTION
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        if not self.fps > 0 or self.side < 16 or min(self.price_in, self.price_out) < 0:
            raise UserError(
                f"fps {self.fps}, side {self.side}, prices {self.price_in} and {self.price_out}; allowed: "
                "above 0, from 16 on, from 0 on"
            )


@dataclass
class Spent:
    """Counts of questions, and their cost.

    Attributes:
        asked: questions of this run.
        known: answers that were there already.
        unread: answers, of both kinds, that could not be read.
        tokens: of the questions that this run asked.
    """

    asked: int = 0
    known: int = 0
    unread: int = 0
    tokens: Tokens = Tokens()

    def text(self, asking: Asking) -> str:
        """One line."""
        cost = (self.tokens.read * asking.price_in + self.tokens.written * asking.price_out) / 1e6
        price = f", cost {cost:.4f}" if asking.price_in or asking.price_out else ""
        return (
            f"{self.asked} questions asked, {self.known} answers known, {self.unread} unreadable; "
            f"{self.tokens.read} tokens read, {self.tokens.written} written{price}"
        )


@dataclass(frozen=True)
class ByModel:
    """Labels of a vision-language model; threads may share it.

    Attributes:
        endpoint: where it is.
        answers: its stored answers.
        asking: settings of the questions.
        spent: what that has cost.
    """

    endpoint: Endpoint
    answers: Answers
    asking: Asking = Asking()
    spent: Spent = field(default_factory=Spent)
    _known: dict[str, str] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        kept = (row for row in self.answers.rows if {"key", "answer"} <= row.keys())
        self._known.update((row["key"], row["answer"]) for row in kept)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return self.endpoint.model

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return a label a segment; UserError naming pair and segment if no try gives an answer."""
        keys = [(self._key(pair, s, turned=False), self._key(pair, s, turned=True)) for s in range(count)]
        parts: list[list[Video]] = []
        if any(key not in self._known for both in keys for key in both):
            how = self.asking
            parts = [cut(pair, video, how.seconds, count, how.fps, how.side) for video in (0, 1)]
        labels = []
        for segment, (straight, turned) in enumerate(keys):
            shown = [videos[segment] for videos in parts]
            answers = [
                self._answer(straight, pair, segment, shown),
                self._answer(turned, pair, segment, shown[::-1]),
            ]
            labels.append(agreed(*map(verdict, answers)))
        return labels

    def _key(self, pair: Pair, segment: int, turned: bool) -> str:
        asking = self.asking
        how = f"{asking.seconds} {asking.fps} {asking.side} {segment} {turned}"
        parts = (self.endpoint.model, asking.question, pair.prompt, pair.content, how)
        return digest(*(part.encode() for part in parts))

    def _answer(self, key: str, pair: Pair, segment: int, shown: Sequence[Video]) -> str:
        """Return what the model says of a segment, shown in this order."""
        known = key in self._known
        if not known:
            try:
                text, tokens = self.endpoint.complete(self._message(pair.prompt, shown), str.strip)
            except NoAnswerError as error:
                raise UserError(
                    f"{pair.where}, segment {segment}: no answer from {self.endpoint.url} (model "
                    f"{self.endpoint.model!r}, {error.tries} tries): {error.problem}; what was answered is "
                    "kept: run it again to go on"
                ) from error
            row = {"key": key, "answer": text, "model": self.endpoint.model, "pair": pair.where}
            self.answers.add({**row, "segment": segment, "read": tokens.read, "written": tokens.written})
            self._known[key] = text
        with self._lock:
            self.spent.asked += not known
            self.spent.known += known
            self.spent.unread += verdict(self._known[key]) is None
            self.spent.tokens += Tokens() if known else tokens
        return self._known[key]

    def _message(self, prompt: str, shown: Sequence[Video]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for number, video in enumerate(shown, 1):
            content.append({"type": "text", "text": f"Video {number}:"})
            urls = [_data_url(frame_image(video, i)) for i in range(len(video.frames))]
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        question = self.asking.question.replace("{prompt}", prompt)
        return [*content, {"type": "text", "text": question}]


def verdict(answer: str) -> Label:
    """Return the word on the last line, or the only one of the three in the whole answer; None if there is
    none.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    for text in (lines[-1:], lines):
        words = {word.lower() for word in _WORDS.findall("\n".join(text))}
        if len(words) == 1:
            word = words.pop()
            return "first" if word == "first" else "second" if word == "second" else "tie"
    return None


def agreed(straight: Label, turned: Label) -> Label:
    """Return the label of answers in both orders: what both say of the same video, otherwise a tie."""
    return straight if (straight, turned) in (("first", "second"), ("second", "first")) else "tie"


def _data_url(image: Image.Image) -> str:
    """Return a JPEG of high quality: PNGs of real frames are ten times as large."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
