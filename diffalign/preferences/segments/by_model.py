"""Segment labels from a vision-language model at an OpenAI-compatible endpoint, asked in both orders.

DenseDPO's recipe: the model gets the frames of a segment of both videos, 8 a second, and the question which
video has fewer artefacts. Models are biased towards a position, so each segment is judged in both orders;
contradicting or unreadable answers are a tie. Every answer is stored at once, with its token counts, so that
no request is repeated after an interruption, or for the same two videos in another file of pairs.
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
class QuestionSettings:
    """Settings of the questions to the model.

    Attributes:
        seconds: length of a segment, in seconds.
        fps: frames a second that are sent, at most the video's own rate.
        side: longest side of a sent frame, in pixels.
        question: the text after the frames; ``{prompt}`` stands for the videos' prompt.
        price_in: price of a million prompt tokens.
        price_out: price of a million completion tokens.
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
class Usage:
    """Counts of requests and their tokens.

    Attributes:
        asked: number of requests of this run.
        known: number of answers that were stored already.
        unread: number of new and stored answers without a verdict.
        tokens: token counts of this run's requests.
    """

    asked: int = 0
    known: int = 0
    unread: int = 0
    tokens: Tokens = Tokens()

    def text(self, settings: QuestionSettings) -> str:
        """Return counts and cost in one line."""
        cost = (self.tokens.read * settings.price_in + self.tokens.written * settings.price_out) / 1e6
        price = f", cost {cost:.4f}" if settings.price_in or settings.price_out else ""
        return (
            f"{self.asked} questions asked, {self.known} answers known, {self.unread} unreadable; "
            f"{self.tokens.read} tokens read, {self.tokens.written} written{price}"
        )


@dataclass(frozen=True)
class ByModel:
    """A labeller that asks a vision-language model; thread-safe.

    Attributes:
        endpoint: the model.
        answers: its stored answers.
        settings: settings of the questions.
        usage: counts of requests and tokens.
    """

    endpoint: Endpoint
    answers: Answers
    settings: QuestionSettings = QuestionSettings()
    usage: Usage = field(default_factory=Usage)
    _known: dict[str, str] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        stored = (row for row in self.answers.rows if {"key", "answer"} <= row.keys())
        self._known.update((row["key"], row["answer"]) for row in stored)

    @property
    def by(self) -> str:
        """Name of the labeller."""
        return self.endpoint.model

    def __call__(self, pair: Pair, count: int) -> list[Label]:
        """Return one label a segment.

        Raises:
            UserError: no try gave an answer; it names pair and segment.
        """
        keys = [(self._key(pair, s, swapped=False), self._key(pair, s, swapped=True)) for s in range(count)]
        parts: list[list[Video]] = []
        if any(key not in self._known for both in keys for key in both):
            settings = self.settings
            parts = [
                cut(pair, video, settings.seconds, count, settings.fps, settings.side) for video in (0, 1)
            ]
        labels = []
        for segment, (in_order, swapped) in enumerate(keys):
            videos = [segments[segment] for segments in parts]
            answers = [
                self._answer(in_order, pair, segment, videos),
                self._answer(swapped, pair, segment, videos[::-1]),
            ]
            labels.append(agreed(*map(verdict, answers)))
        return labels

    def _key(self, pair: Pair, segment: int, swapped: bool) -> str:
        settings = self.settings
        variant = f"{settings.seconds} {settings.fps} {settings.side} {segment} {swapped}"
        parts = (self.endpoint.model, settings.question, pair.prompt, pair.content, variant)
        return digest(*(part.encode() for part in parts))

    def _answer(self, key: str, pair: Pair, segment: int, videos: Sequence[Video]) -> str:
        """Return the model's answer about a segment with the videos in this order, stored or new."""
        known = key in self._known
        if not known:
            try:
                text, tokens = self.endpoint.complete(self._message(pair.prompt, videos), str.strip)
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
            self.usage.asked += not known
            self.usage.known += known
            self.usage.unread += verdict(self._known[key]) is None
            self.usage.tokens += Tokens() if known else tokens
        return self._known[key]

    def _message(self, prompt: str, videos: Sequence[Video]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for number, video in enumerate(videos, 1):
            content.append({"type": "text", "text": f"Video {number}:"})
            urls = [_data_url(frame_image(video, i)) for i in range(len(video.frames))]
            content += [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        question = self.settings.question.replace("{prompt}", prompt)
        return [*content, {"type": "text", "text": question}]


def verdict(answer: str) -> Label:
    """Return the verdict of an answer, or None if it has none.

    It is the only verdict word on the last line, or else the only one in the whole answer.
    """
    lines = [line for line in answer.splitlines() if line.strip()]
    for text in (lines[-1:], lines):
        words = {word.lower() for word in _WORDS.findall("\n".join(text))}
        if len(words) == 1:
            word = words.pop()
            return "first" if word == "first" else "second" if word == "second" else "tie"
    return None


def agreed(in_order: Label, swapped: Label) -> Label:
    """Return the label from the verdicts in both orders: the video that both prefer, else a tie."""
    return in_order if (in_order, swapped) in (("first", "second"), ("second", "first")) else "tie"


def _data_url(image: Image.Image) -> str:
    """Return an image as a JPEG of quality 95 in a data URL; PNGs of real frames are ten times as large."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
